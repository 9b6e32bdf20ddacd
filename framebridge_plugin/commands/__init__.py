"""What the subcommands of `finetrainers` do, a file each; `cli` imports one when it is asked for."""
