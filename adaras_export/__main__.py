"""The command line as a module, for launchers: accelerate launch -m adaras_export identify ..."""

from adaras_export.cli import main

if __name__ == "__main__":
    main()
