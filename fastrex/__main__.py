"""``python -m fastrex`` and ``torchrun -m fastrex``."""

from .cli import main

if __name__ == "__main__":
    main()
