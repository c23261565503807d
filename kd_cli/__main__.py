from kd_cli.commands.kd_run import entry

entry()
