"""What a person sees and answers; the only users of rich and questionary."""
