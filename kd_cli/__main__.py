from kd_cli.cli import entry

entry()
