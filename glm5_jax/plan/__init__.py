"""What a step on many chips takes: memory, work, communication, time."""
