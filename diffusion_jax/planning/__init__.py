"""What a program costs, found without running it (plan) or by watching it run (profile)."""
