"""Instructions whose answers are compared; none of them is a prompt for calibration text."""

INSTRUCTIONS = (
    "What is the capital of France, and what is it known for?",
    "Why is the sky blue during the day and red at sunset?",
    "Give me three tips for packing a suitcase.",
    "Write two sentences about a dog that is afraid of thunder.",
    "How do I boil an egg so that the yolk stays soft?",
    "What is the difference between a lake and a pond?",
    "Rewrite this politely: Send me the report now.",
    "Name four animals that sleep in winter.",
    "What does a dentist do?",
    "Explain in one paragraph what a thermometer measures.",
    "Which is heavier, a kilogram of feathers or a kilogram of iron?",
    "Suggest a name for a small bakery, and say why it fits.",
    "Summarise in one sentence: The train was late because of snow, so the meeting began an hour after noon.",
    "How many days are there in a leap year, and why?",
    "Write a short thank-you note to a neighbour who watered my plants.",
    "What should I do if I get lost in a city that I do not know?",
    "List the colours of a rainbow in order.",
    "What is the plural of mouse, and of goose?",
    "Describe the taste of a lemon to a child.",
    "Why do ships float although they are made of steel?",
)
