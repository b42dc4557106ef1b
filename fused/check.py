"""Do the fast forms compute linear attention on this machine? Each one against float64, on every shape that matters.

    python -m fused.check --device cuda     minutes on a GPU, most of them for compiling

Prints one line a case and writes all of them to a JSON file, line after line, so that a crash loses none. The
exit code is 1 if a case failed. Needs PyTorch and, on a GPU, Triton. Measure speed afterwards with bench.py.
"""

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import fused
from feature_maps import make_feature_map
from fused.chunked import chunked

B, H = 2, 3
LENGTHS = (1, 17, 64, 129, 1000)  # one token, just above the quadratic form, one chunk, odd, many chunks
MAPS = (("hedgehog", 16), ("hedgehog", 64), ("hedgehog", 128), ("elu", 64), ("hedgehog", 130))  # (map, D)
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative errors of outputs, states and gradients
PIECES, REPEATS = 100, 100_000


def error(got: Tensor, want: Tensor) -> float:
    """Error of a tensor relative to its float64 value, or to 1 if that is less: at one token most gradients
    are 0. Infinite if something is not finite."""
    got = got.detach().double().cpu()
    if not torch.isfinite(got).all():
        return math.inf
    return ((got - want).norm() / want.norm().clamp(min=1.0)).item()


def inputs(T: int, D: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k, v and the gradient of y: the same numbers for every form."""
    generator = torch.Generator().manual_seed(T)
    return [x.to(device, dtype) for x in torch.randn(4, B, H, T, D, generator=generator).unbind()]


def errors_of(name: str, D: int, T: int, dtype: torch.dtype, masked: bool, device: torch.device) -> dict:
    """Errors of y, of the state, and of the gradients of q, k, v and the map's parameters."""
    torch.manual_seed(0)
    phi = make_feature_map(name, H, D)
    exact = make_feature_map(name, H, D).double()
    exact.load_state_dict(phi.state_dict())
    q, k, v, dy = inputs(T, D, dtype, device)
    mask = torch.arange(T) % 3 != 1 if masked else None
    mask = mask if mask is None else mask.expand(B, T)

    def run(attend, phi, q, k, v, dy, mask) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        y, S, z = attend(phi, *leaves, mask)
        grads = torch.autograd.grad(y, [*leaves, *phi.parameters()], dy)
        return [y, S, z, *grads]

    def fast(phi, q, k, v, mask):
        y, state = fused.attend(phi, q, k, v, key_mask=mask)
        return y, *state

    def reference(phi, q, k, v, mask):
        return chunked(phi, q, k, v, key_mask=mask)

    want = run(reference, exact, *(x.cpu().double() for x in (q, k, v, dy)), mask)
    got = run(fast, phi.to(device), q, k, v, dy, None if mask is None else mask.to(device))
    names = ["y", "S", "z", "dq", "dk", "dv", *(f"d{n}" for n, _ in phi.named_parameters())]
    return {name: error(x, y.detach()) for name, x, y in zip(names, got, want)}


@torch.no_grad()
def carried(D: int, dtype: torch.dtype, device: torch.device) -> dict:
    """Errors of a state that is carried over many pieces of 1 to 16 tokens."""
    phi, (q, k, v, _) = make_feature_map("hedgehog", H, D), inputs(8 * PIECES, D, dtype, device)
    want = chunked(make_feature_map("hedgehog", H, D).double(), *(x.cpu().double() for x in (q, k, v)))
    lengths = torch.randint(1, 17, (PIECES,), generator=torch.Generator().manual_seed(0)).tolist()
    lengths.append(max(0, q.size(2) - sum(lengths)))
    state, ys, at = None, [], 0
    for n in lengths:
        y, state = fused.attend(phi.to(device), *(x[:, :, at : at + n] for x in (q, k, v)), state, offset=at)
        ys, at = [*ys, y], at + n
    return {n: error(x, y) for n, x, y in zip(("y", "S", "z"), (torch.cat(ys, 2), *state), want)}


@torch.no_grad()
def repeated(D: int, dtype: torch.dtype, device: torch.device, repeats: int) -> dict:
    """How many of many equal decoding steps gave another result: none may."""
    phi, (q, k, v, _) = make_feature_map("hedgehog", H, D).to(device), inputs(1, D, dtype, device)
    state = torch.randn(B, H, 2 * D, D, device=device), torch.rand(B, H, 2 * D, device=device) + 1
    y, (S, z) = fused.attend(phi, q, k, v, state)
    different = torch.zeros((), dtype=torch.long, device=device)
    for _ in range(repeats):
        again, (S2, z2) = fused.attend(phi, q, k, v, state)
        different += (again != y).any() | (S2 != S).any() | (z2 != z).any()
    return {"different": different.item()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kernel", default="auto", choices=fused.KERNELS)
    parser.add_argument("--out", default="out/check.json", help="file that receives all cases")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="equal decoding steps")
    args = parser.parse_args()
    device, began, rows, out = torch.device(args.device), time.perf_counter(), [], Path(args.out)
    fused.use(args.kernel, device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    about = {
        "device": str(device),
        "machine": gpu,
        "torch": torch.__version__,
        "form": fused.describe(device),
    }
    print(", ".join(about.values()), flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)

    def case(label: str, bound: float, check, *arguments) -> None:
        try:
            found = check(*arguments)
            ok, why = all(x <= bound for x in found.values()), ""
        except Exception as e:  # the next case is still worth a line
            found, ok, why = {}, False, f"{type(e).__name__}: {e}".splitlines()[0]
        rows.append({"case": label, "ok": ok, "bound": bound, **found, **({"error": why} if why else {})})
        out.write_text(json.dumps({**about, "minutes": (time.perf_counter() - began) / 60, "rows": rows}))
        worst = max(found, key=found.get) if found else ""
        print(f"{'ok  ' if ok else 'FAIL'} {label:44} {worst:6} {why or f'{found[worst]:.1e}'}", flush=True)

    for dtype, bound in BOUNDS.items():
        kind = str(dtype).removeprefix("torch.")
        for name, D in MAPS:
            for T in LENGTHS:
                for masked in (False, True):
                    label = f"{kind} {name} D={D} T={T}{' masked' if masked else ''}"
                    case(label, bound, errors_of, name, D, T, dtype, masked, device)
        case(f"{kind} state over {PIECES} pieces", bound, carried, 64, dtype, device)
        case(f"{kind} {args.repeats:,} equal steps", 0, repeated, 64, dtype, device, args.repeats)
    failed = sum(not row["ok"] for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} cases are right; written to {out}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
