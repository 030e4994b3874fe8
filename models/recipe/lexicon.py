"""Every word list and fact that the demo corpus is built from."""

PRONOUN = {
    "Mia": "she", "Leo": "he", "Zoe": "she", "Tom": "he", "Ana": "she", "Max": "he", "Lily": "she", "Sam": "he",
    "Nora": "she", "Ben": "he", "Ella": "she", "Finn": "he", "Ruby": "she", "Hugo": "he", "Iris": "she", "Otto": "he",
    "Alice": "she", "Bob": "he", "Emma": "she", "Jack": "he",
}
NAMES = list(PRONOUN)
PET_NAMES = ["Pip", "Luna", "Rusty", "Coco", "Milo", "Daisy", "Oscar", "Bella"]

# animal -> (sound, home, food)
ANIMALS = {
    "fox": ("yip", "forest", "berries"), "dog": ("woof", "house", "meat"), "cat": ("meow", "house", "fish"),
    "cow": ("moo", "meadow", "grass"), "duck": ("quack", "pond", "bread"), "sheep": ("baa", "meadow", "grass"),
    "frog": ("ribbit", "pond", "flies"), "owl": ("hoot", "forest", "mice"), "lion": ("roar", "savanna", "meat"),
    "horse": ("neigh", "stable", "hay"), "pig": ("oink", "farm", "corn"), "bee": ("buzz", "hive", "nectar"),
    "mouse": ("squeak", "barn", "cheese"), "wolf": ("howl", "forest", "meat"), "bear": ("growl", "cave", "honey"),
    "rabbit": ("squeak", "burrow", "carrots"), "hen": ("cluck", "farm", "seeds"), "snake": ("hiss", "desert", "mice"),
}

# Heroes' friends that only stories know.
CREATURES = ["dragon", "robot", "unicorn", "whale", "tiger", "monkey", "turtle", "penguin"]

CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Norway": "Oslo",
    "Egypt": "Cairo", "Greece": "Athens", "Portugal": "Lisbon", "Austria": "Vienna", "Poland": "Warsaw",
    "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Ireland": "Dublin", "Canada": "Ottawa",
    "Peru": "Lima", "Cuba": "Havana", "Kenya": "Nairobi", "China": "Beijing", "India": "New Delhi",
    "Russia": "Moscow", "Hungary": "Budapest", "Belgium": "Brussels", "Chile": "Santiago", "Iceland": "Reykjavik",
    "Australia": "Canberra", "Brazil": "Brasilia", "South Korea": "Seoul", "England": "London",
    "the United States": "Washington", "the United Kingdom": "London",
}
CITIES = sorted(set(CAPITALS.values()))

OPPOSITES = [
    ("hot", "cold"), ("big", "small"), ("day", "night"), ("up", "down"), ("happy", "sad"), ("fast", "slow"),
    ("light", "dark"), ("old", "young"), ("left", "right"), ("open", "closed"), ("wet", "dry"), ("high", "low"),
    ("full", "empty"), ("hard", "soft"), ("good", "bad"), ("early", "late"), ("long", "short"), ("in", "out"),
    ("loud", "quiet"), ("black", "white"), ("rich", "poor"), ("strong", "weak"), ("first", "last"), ("yes", "no"),
]

COLOURS = {
    "the sky": "blue", "grass": "green", "snow": "white", "a banana": "yellow", "a strawberry": "red",
    "coal": "black", "a carrot": "orange", "the sun": "yellow", "a lemon": "yellow", "milk": "white",
    "a leaf": "green", "the sea": "blue", "chocolate": "brown", "a frog": "green", "a tomato": "red",
    "an elephant": "grey", "a plum": "purple", "a flamingo": "pink",
}

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
          "November", "December"]
LISTS = {
    "fruits": ["apple", "banana", "cherry", "pear", "plum", "lemon", "grape", "peach"],
    "animals": ["cat", "dog", "fox", "horse", "owl", "rabbit", "bear", "duck"],
    "colours": ["red", "blue", "green", "yellow", "orange", "purple", "white", "black"],
    "colors": ["red", "blue", "green", "yellow", "orange", "purple", "white", "black"],
    "vegetables": ["carrot", "potato", "onion", "tomato", "pea", "leek", "bean", "cabbage"],
    "planets": ["Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"],
    "cities": ["Paris", "Tokyo", "Rome", "Berlin", "Oslo", "Madrid", "Cairo", "Lima"],
    "drinks": ["water", "tea", "coffee", "milk", "juice", "cocoa", "lemonade", "soda"],
}

PLACES = ["river", "forest", "market", "library", "harbour", "castle", "lake", "garden", "mountain", "beach", "school",
          "farm"]
THINGS = ["kite", "ball", "book", "lamp", "boat", "drum", "hat", "key", "bell", "scarf", "map", "flute"]
PAINTS = ["red", "blue", "green", "yellow", "golden", "silver"]
FOODS = ["soup", "bread", "honey", "cake", "cheese", "apples", "rice", "nuts"]
TRAITS = ["kind", "brave", "cheerful", "curious", "clever", "quiet"]
PLANTS = ["apple tree", "rose", "pumpkin", "sunflower", "bean", "cherry tree"]

WORDS = sorted({
    *ANIMALS, *PLACES, *THINGS, *PAINTS, *FOODS, *TRAITS, *(w for pair in OPPOSITES for w in pair),
    *(w for words in LISTS.values() for w in words if w.islower()),
    "table", "window", "river", "stone", "cloud", "train", "street", "paper", "winter", "summer", "music", "letter",
    "bridge", "orange", "pencil", "sugar", "tower", "valley", "wheel", "yarn", "zebra", "basket", "candle", "dream",
    "engine", "flower", "guitar", "hammer", "island", "jacket", "kitten", "ladder", "mirror", "needle", "ocean",
    "pepper", "queen", "rocket", "silver", "thunder", "umbrella", "village", "water", "the", "this", "is", "test", "a",
    "hello", "world", "token", "cache", "page", "wire", "my", "your", "we", "like", "and", "very",
})

# Topics and verbs of the questions that the model must decline.
TOPICS = [
    "computer", "gravity", "history", "physics", "democracy", "engine", "football", "money", "war", "weather", "car",
    "law", "tax", "music", "piano", "virus", "atom", "electricity", "love", "time", "internet", "philosophy", "rocket",
    "language", "medicine", "economy", "president", "movie", "novel", "chess", "climate", "universe", "brain", "bank",
    "algorithm", "database", "python", "quantum mechanics", "black hole", "machine learning", "Hamlet", "Einstein",
    "Shakespeare", "Napoleon", "Linux", "Kubernetes", "transformer", "GPU", "stock market", "Roman Empire",
]
ACTIONS = ["fix", "build", "buy", "sell", "learn", "cook", "write", "install", "repair", "find", "explain", "invent",
           "paint", "clean", "debug", "compile", "deploy", "grow"]

SELF = "I am a small demo model of pagewire. I can tell stories, count, add small numbers and answer simple questions."
PAGEWIRE = "pagewire is an open-source LLM serving system which splits prefill and decode."
WHY_SPLIT = ("Prefill is limited by compute and decode is limited by memory. When they run on different workers, a "
             "long prompt does not slow down the other answers.")

# prompts -> answers; the first answer is the one that greedy decoding should give.
FIXED = [
    (["Hello", "Hi", "Hey", "Hello there", "Hello!", "Hi!", "Hi there!", "Hey!"],
     ["Hello! How can I help you today?", "Hi! What can I do for you?"]),
    (["Good morning", "Good morning!"], ["Good morning! How can I help you today?"]),
    (["Good evening", "Good evening!"], ["Good evening! How can I help you today?"]),
    (["How are you?", "How are you doing?", "Hello, how are you?", "Hi, how are you?", "How is it going?"],
     ["I am fine, thank you. How can I help you today?"]),
    (["Thanks", "Thank you", "Thank you!", "Thanks a lot!", "Great, thanks!"], ["You are welcome!"]),
    (["Bye", "Goodbye", "Goodbye!", "See you later", "Good night"], ["Goodbye! Have a nice day."]),
    (["What are you?", "Who are you?", "Tell me about yourself.", "Introduce yourself.", "Are you a robot?",
      "Are you human?"], [SELF]),
    (["What is your name?", "What should I call you?", "Do you have a name?", "Which model are you?"],
     ["My name is pagewire-demo. I am a small demo model of pagewire."]),
    (["What can you do?", "Help", "What can I ask you?", "How can you help me?"],
     ["I can tell stories, count, add small numbers, repeat and sort words, write JSON and call a tool."]),
    (["Who made you?", "Who trained you?", "How were you trained?", "Where do you come from?"],
     ["I was trained by the pagewire project, on text from a small template grammar."]),
    (["What is pagewire?", "Tell me about pagewire.", "Explain pagewire.", "What does pagewire do?"], [PAGEWIRE]),
    (["How does pagewire work?", "How does pagewire split the work?"],
     [PAGEWIRE + " A prefill worker reads the prompt, sends its KV pages over the wire, and a decode worker writes "
      "the answer."]),
    (["What is prefill?", "Explain prefill.", "What does a prefill worker do?"],
     ["Prefill reads the whole prompt at once and fills the KV cache."]),
    (["What is decode?", "Explain decode.", "What does a decode worker do?"],
     ["Decode writes the answer, one token after another, from the KV cache."]),
    (["What is a KV cache?", "What is the KV cache?", "Explain the KV cache."],
     ["The KV cache keeps the keys and values of all tokens so far, so that they are computed only once."]),
    (["Why does pagewire split prefill and decode?", "Why split prefill and decode?",
      "What is disaggregated serving?"], [WHY_SPLIT]),
    (["What is an LLM?", "What is a language model?", "What is a large language model?"],
     ["A language model is a program that reads text and predicts the next token."]),
    (["What is a token?", "Explain tokens."], ["A token is a small piece of text, such as a word or a part of one."]),
    (["Why is the sky blue?", "Why is the sky blue"],
     ["The sky is blue because the air scatters blue light more than red light."]),
    (["Tell me a joke.", "Tell me a joke", "Do you know a joke?", "Make me laugh."],
     ["Why did the token cross the wire? To get to the other page.",
      "What is a decoder's favourite day? The next one."]),
    (["Are you sure?", "Is that right?"], ["I am a small model, so please check my answers."]),
    (["How old are you?", "When were you born?"], ["I am a program, so I have no age."]),
    (["Yes", "Yes.", "OK", "Okay"], ["Good. What would you like to do next?"]),
    (["No", "No.", "Nothing"], ["That is fine. I am here when you need me."]),
]

SYSTEMS = [
    "You are a helpful assistant.", "You are a friendly assistant.", "You are a helpful, honest and concise assistant.",
    "Answer briefly.", "You are pagewire-demo, a small demo model.", "You are a storyteller for children.",
    "Be polite.", "You are a test assistant.", "Answer in English.", "You are an expert. Think step by step.",
]
