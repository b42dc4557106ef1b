"""LoRA (Hu et al., 2022) beside the attention of a transformers model, by peft."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf.kinds import attention_modules, language_part
from swap import ZeroAttention, sockets

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]  # as Llama and most decoders name them
MLP = ["gate_proj", "up_proj", "down_proj"]


def attention_projections(model: nn.Module) -> list[str]:
    """The names of all projections inside the attention modules of a model: target_modules of peft."""
    maps = {part for socket in sockets(model) for part in socket.modules()}
    inside = {part for m in attention_modules(language_part(model)) for part in m.modules()} - maps
    return [name for name, m in model.named_modules() if m in inside and isinstance(m, (nn.Linear, Conv1D))]


def add_lora(model: nn.Module, r: int, alpha: float) -> list[nn.Parameter]:
    """Add LoRA to all projections inside attention, in place, and return the parameters of LoRA.

    r: rank of the update.    alpha: the update is scaled by alpha / r.
    Only these parameters and the maps stay trainable. In mode "zero", where q, k, v and o have no effect,
    LoRA goes to the MLP.
    """
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    without_attention = any(type(socket.attend) is ZeroAttention for socket in sockets(model))
    names = MLP if without_attention else attention_projections(model)
    inject_adapter_in_model(LoraConfig(r=r, lora_alpha=alpha, target_modules=names), model)
    for socket in sockets(model):
        phi = socket.attend.phi
        phi.requires_grad_(not getattr(phi, "idle", False))
    added = [p for name, p in model.named_parameters() if "lora_" in name]
    for p in added:
        p.data = p.data.float()  # also beside weights in bfloat16, which would lose small steps
    return added


def lora_config(train_maps: bool = True, **options):
    """A LoraConfig of peft for a linearized model: get_peft_model freezes all weights but those of the
    adapter, the maps too. With train_maps they train beside it, and are saved and loaded with the adapter.

    options: those of LoraConfig. By default target_modules are q_proj, k_proj, v_proj and o_proj, the names of
    Llama; for another architecture give target_modules=attention_projections(model).
    """
    from peft import LoraConfig

    maps = ["phi"] if train_maps else []
    options["modules_to_save"] = [*(options.get("modules_to_save") or []), *maps] or None
    return LoraConfig(**{"target_modules": ATTENTION, **options})


def merge_lora(model: nn.Module) -> nn.Module:
    """Add the update of LoRA to the weights, remove the adapters, and return the model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    return model
