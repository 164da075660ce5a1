"""The ViT that is trained: the model, its optimiser, its checkpoints."""

from cskd.method.losses import StudentOutput
from cskd.student.model import Student, build_student, eval_heads, pool_tokens

__all__ = ["Student", "StudentOutput", "build_student", "eval_heads", "pool_tokens"]
