"""`ondevice bench`: how fast a model reads prompts and answers, and what it moves through memory for that."""
