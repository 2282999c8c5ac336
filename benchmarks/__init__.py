"""How long steps and images take, what memory they need, and how near that is to what the machine can do."""
