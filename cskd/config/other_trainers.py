"""Keys and values as other trainers call them, with what they are here: their nearest name would often be another thing.

Those of timm's and DeiT's scripts and of the CSKD authors' code; docs/howto/coming_from.md has them as tables.
"""

from __future__ import annotations

from collections.abc import Sequence

_HERE = {
    **dict.fromkeys(("batch_size", "batchsize", "bs", "batch"), "train.global_batch"),
    **dict.fromkeys(("learning_rate", "learningrate", "base_lr"), "train.lr"),
    **dict.fromkeys(("amp", "mixed_precision", "fp16", "bf16"), "train.autocast"),
    **dict.fromkeys(("num_workers", "n_workers"), "train.workers"),
    "wd": "train.weight_decay",
    **dict.fromkeys(("output_dir", "out", "save_dir"), "train.output"),
    **dict.fromkeys(("repeated_aug", "aug_repeats"), "train.repeats"),
    **dict.fromkeys(("model_ema", "model_ema_decay"), "train.ema"),
    **{"grad_accum_steps": "train.micro_batch", "torchcompile": "train.compile"},
    **dict.fromkeys(("aa", "auto_augment"), "recipe.randaugment"),
    **{"hflip": "recipe.flip", "reprob": "recipe.erase", "recount": "recipe.erase_count"},
    **{"mixup_prob": "recipe.mix_prob", "mixup_switch_prob": "recipe.mix_switch"},
    **dict.fromkeys(("drop_path", "drop_path_rate"), "student.drop_path"),
    **dict.fromkeys(("smoothing", "label_smoothing"), "loss.smoothing"),
    **dict.fromkeys(("temperature", "kd_temperature", "deit_tau", "distillation_tau"), "loss.tau"),
    **dict.fromkeys(("deit_alpha", "distillation_alpha"), "loss.alpha"),
    **{"cskd_decay_func": "loss.decay", "cksd_loss_weight": "loss.patch_weight"},
}
_NOT_HERE = {
    **dict.fromkeys(("sched", "scheduler", "lr_scheduler"), "the learning rate warms up and falls by a cosine, always"),
    **dict.fromkeys(("betas", "opt_betas", "opt_eps", "momentum"), "an optimiser has timm's default for it"),
    "layer_decay": "all layers have one learning rate",
    "vflip": "views are never turned upside down",
    **dict.fromkeys(("bce", "bce_loss"), "the label term is a cross entropy"),
    "mixup_off_epoch": "views are mixed alike in all epochs; recipe.mix_prob is the share of them",
    **dict.fromkeys(("drop", "drop_rate", "dropout"), "it is the model's: student.kwargs: {drop_rate: 0.1}"),
}
_PRECISIONS = {  # the first that a key takes
    **dict.fromkeys(("fp32", "float32", "single", "float"), ("float32", "none")),
    **{"fp64": ("float64",), "double": ("float64",)},
    **{"bfloat16": ("bf16",), "float16": ("fp16",), "half": ("fp16",)},
}


def elsewhere(key: str, prefix: str) -> str:
    """What an unknown key is here, or why it is not here; '' where nobody is known to call something so.

    prefix: of the section that it was written in, `train.`, or '' outside of any.
    """
    plain = key.lower().replace("-", "_")
    here = _HERE.get(plain, "")
    if here and prefix in ("", "train.", here.partition(".")[0] + "."):
        return f"here it is '{here}'"
    return f"not here: {_NOT_HERE[plain]}" if plain in _NOT_HERE and prefix.count(".") <= 1 else ""


def same_precision(value: str, options: Sequence[str]) -> str:
    """`write bf16` for another name of a precision that is among the options; '' where there is none."""
    found = next((one for one in _PRECISIONS.get(value.lower(), ()) if one in options), None)
    return f"write {found}" if found else ""
