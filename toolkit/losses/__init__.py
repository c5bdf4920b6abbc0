"""Distillation losses, one a file: a module from student's and teacher's logits ``[B,K]`` to a scalar."""
