"""Pictures of where a program's memory goes."""
