"""The process a target engine runs in, apart from the trainer's and in an interpreter of its own.

Everything here and in `backends.<engine>.worker` needs the standard library, torch, safetensors and its engine, and of
torchspec the interfaces, errors and feature stores alone: the trainer's dependencies are not in that environment.
"""
