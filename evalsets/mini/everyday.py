"""Everyday facts in our own words: the tables of the subject `everyday_things`."""

OPPOSITES = {
    "hot": "cold", "big": "small", "wet": "dry", "fast": "slow", "high": "low", "old": "young", "light": "dark",
    "full": "empty", "hard": "soft", "long": "short", "loud": "quiet", "near": "far", "open": "shut",
    "early": "late", "heavy": "weightless", "strong": "weak", "rich": "poor", "sharp": "blunt", "sweet": "bitter",
    "clean": "dirty", "thick": "thin", "wide": "narrow", "deep": "shallow", "rough": "smooth", "tame": "wild",
    "brave": "timid", "straight": "bent", "fresh": "stale",
}  # fmt: skip

KINDS = {
    "fruit": ("apple", "pear", "plum", "cherry", "grape", "lemon"),
    "bird": ("robin", "owl", "crow", "swan", "wren", "finch"),
    "fish": ("trout", "salmon", "herring", "carp", "perch", "cod"),
    "flower": ("rose", "daisy", "tulip", "poppy", "lily", "violet"),
    "tree": ("oak", "birch", "willow", "beech", "pine", "elm"),
    "tool": ("hammer", "saw", "chisel", "spade", "rake", "drill"),
    "garment": ("coat", "shirt", "sock", "glove", "scarf", "skirt"),
    "instrument": ("flute", "fiddle", "harp", "trumpet", "organ", "banjo"),
}

COLOURS = {
    "snow": "white", "coal": "black", "grass": "green", "blood": "red", "a ripe lemon": "yellow",
    "a clear noon sky": "blue", "ash": "grey", "a carrot": "orange", "chocolate": "brown", "milk": "white",
    "a leaf in May": "green", "soot": "black", "a sunflower": "yellow", "a ripe strawberry": "red",
}  # fmt: skip

USES = {
    "needle": "sewing", "oven": "baking", "broom": "sweeping", "pen": "writing", "ladle": "serving soup",
    "kettle": "boiling water", "axe": "splitting logs", "bed": "sleeping", "boat": "crossing water",
    "clock": "telling the time", "ladder": "climbing", "lamp": "giving light", "map": "finding the way",
    "net": "catching fish", "oar": "rowing", "scales": "weighing", "scissors": "cutting cloth",
    "soap": "washing", "umbrella": "keeping off rain", "bucket": "carrying water",
}  # fmt: skip

YOUNG = {
    "dog": "puppy", "cat": "kitten", "cow": "calf", "sheep": "lamb", "horse": "foal", "goose": "gosling",
    "duck": "duckling", "goat": "kid", "bear": "cub", "frog": "tadpole", "hen": "chick", "pig": "piglet",
    "deer": "fawn", "eagle": "eaglet",
}  # fmt: skip
