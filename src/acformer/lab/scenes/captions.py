"""What a scene holds, in words: every object with its size and place, then what is printed."""

from acformer.lab.scenes.difficulty import nouns_by_name
from acformer.lab.scenes.layout import Scene, place_name, size_name


def caption(scene: Scene) -> str:
    """`a small cat top left, a large dog bottom right. it says river top right.`"""
    nouns = nouns_by_name()
    articles = ["" if nouns[o.text].form else "a " for o in scene.objects]
    sizes = [size_name(o, scene.difficulty) for o in scene.objects]
    seen = ", ".join(
        f"{article}{size} {thing.text} {place_name(thing)}"
        for article, size, thing in zip(articles, sizes, scene.objects, strict=True)
    )
    read = "".join(f" it says {word.text} {place_name(word)}." for word in scene.words)
    return f"{seen}.{read}"
