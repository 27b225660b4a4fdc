"""The subcommands of `glm5-convert`. Nothing slow is imported before a command runs."""
