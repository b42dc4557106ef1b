"""Do the fast forms compute linear attention on this machine? Each one against float64, on every shape that matters.

    python -m fused.check --device cuda     minutes on a GPU, most of them for compiling

Prints one line a case and writes all of them to a JSON file, line after line, so that a crash loses none. The
exit code is 1 if a case failed. Needs PyTorch and, on a GPU, Triton. bench.py, which measures the speed, puts
these cases into its own file, as long as the kernels are still the same.
"""

import argparse
import hashlib
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
DIMS = (16, 32, 64, 80, 128, 256)  # of a head, for Hedgehog: a power of two and others, up to the largest
MAPS = (*(("hedgehog", D) for D in DIMS), ("elu", 64))  # (map, D)
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
def carried(dims: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict:
    """Errors of a state that is carried over many pieces of 1 to 16 tokens, for each D."""
    lengths = torch.randint(1, 17, (PIECES,), generator=torch.Generator().manual_seed(0)).tolist()
    lengths.append(max(0, 8 * PIECES - sum(lengths)))
    errors = {}
    for D in dims:
        phi, (q, k, v, _) = make_feature_map("hedgehog", H, D), inputs(8 * PIECES, D, dtype, device)
        want = chunked(make_feature_map("hedgehog", H, D).double(), *(x.cpu().double() for x in (q, k, v)))
        phi, state, ys, at = phi.to(device), None, [], 0
        for n in lengths:
            y, state = fused.attend(phi, *(x[:, :, at : at + n] for x in (q, k, v)), state, offset=at)
            ys, at = [*ys, y], at + n
        found = zip(("y", "S", "z"), (torch.cat(ys, 2), *state), want)
        errors |= {f"{name}, D={D}": error(x, y) for name, x, y in found}
    return errors


@torch.no_grad()
def repeated(dims: tuple[int, ...], dtype: torch.dtype, device: torch.device, repeats: int) -> dict:
    """How many of many equal decoding steps gave another result, for each D: none may. The first D has
    all the repeats, the others a tenth."""
    found = {}
    for D in dims:
        phi, (q, k, v, _) = make_feature_map("hedgehog", H, D).to(device), inputs(1, D, dtype, device)
        state = torch.randn(B, H, 2 * D, D, device=device), torch.rand(B, H, 2 * D, device=device) + 1
        y, (S, z) = fused.attend(phi, q, k, v, state)
        different = torch.zeros((), dtype=torch.long, device=device)
        for _ in range(repeats if D == dims[0] else repeats // 10):
            again, (S2, z2) = fused.attend(phi, q, k, v, state)
            different += (again != y).any() | (S2 != S).any() | (z2 != z).any()
        found[f"D={D}"] = different.item()
    return found


def sources() -> str:
    """A checksum of the kernels, as they are now: what was checked."""
    files = [p for p in sorted(Path(__file__).parent.iterdir()) if p.suffix in (".py", ".cpp")]
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kernel", default="auto", choices=fused.KERNELS)
    parser.add_argument("--out", default="out/check.json", help="file that receives all cases")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="equal decoding steps")
    parser.add_argument("--dims", type=int, nargs="+", help="check these dimensions of a head only")
    args = parser.parse_args()
    began, rows, out = time.perf_counter(), [], Path(args.out)
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        fused.use(args.kernel, device)
    except (RuntimeError, AssertionError, ValueError) as e:
        parser.error(f"--device {args.device}, --kernel {args.kernel}: {str(e).splitlines()[0]}")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    about = {
        "device": str(device),
        "machine": gpu,
        "torch": torch.__version__,
        "form": fused.describe(device),
        "sources": sources(),
    }
    print(", ".join(list(about.values())[:-1]), flush=True)
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
        print(f"{'ok  ' if ok else 'FAIL'} {label:36} {worst:9} {why or f'{found[worst]:.1e}'}", flush=True)

    dims = sorted(args.dims or DIMS, key=lambda D: D != 64)  # 64 first: it has all the repeats
    for dtype, bound in BOUNDS.items():
        kind = str(dtype).removeprefix("torch.")
        for name, D in (m for m in MAPS if m[1] in (args.dims or [m[1]])):
            for T in LENGTHS:
                for masked in (False, True):
                    label = f"{kind} {name} D={D} T={T}{' masked' if masked else ''}"
                    case(label, bound, errors_of, name, D, T, dtype, masked, device)
        case(f"{kind} state over {PIECES} pieces", bound, carried, dims, dtype, device)
        case(f"{kind} {args.repeats:,} equal steps", 0, repeated, dims, dtype, device, args.repeats)
    failed, minutes = sum(not row["ok"] for row in rows), (time.perf_counter() - began) / 60
    print(f"{len(rows) - failed} of {len(rows)} cases are right; {minutes:.1f} minutes; written to {out}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
