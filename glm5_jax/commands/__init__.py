"""The subcommands of `glm5`, one file each. Nothing slow is imported before a command runs."""
