"""Does the selection save labels? Tasks, methods and statistics behind docs/evidence.md."""
