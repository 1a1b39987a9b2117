"""``python -m blobspace.cluster.command_line`` is the script ``blobspace``."""

from . import main

if __name__ == "__main__":
    main()
