"""``python -m agentrl`` is the ``agentrl`` command, as ``torchrun -m agentrl train ...`` needs it."""

from agentrl.cli import main

if __name__ == "__main__":
    main()
