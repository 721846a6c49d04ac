"""Offline knowledge distillation: a teacher's soft labels as a versioned dataset."""

__version__ = "0.1.0"
