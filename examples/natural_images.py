"""Natural images for `acformer stats`: photographs from Debian packages and scikit-image, cut to 336 x 336 pixels.

    acformer fetch photographs
    python examples/natural_images.py

Nothing is installed: `apt-get download` fetches the packages, 330 MB, into a folder that is deleted afterwards.
What comes of them goes to `<cache>/natural-images/`, some 90 MB:

    photographs/<name>/NN.png  39 photographs, 13 crops each: a folder a photograph, whose crops are not independent
    stamps/<name>.png          photographed animals, plants and things of Tux Paint, cut out by its authors, on a plain
                               ground of the mean colour of ImageNet, so that no edge but their own is seen
    manifest.json              of every picture: package, version, file, licence (debian/copyright), crop box

The same packages give the same pictures: boxes are drawn from the photograph's name. The names below were chosen by
looking: of the 91 pictures of these packages, renders, drawings and patterns were left out (all of ukui-wallpapers and
gnome-backgrounds), and so were silhouettes and cartoons among the stamps.
"""

import json
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from PIL import Image

from acformer.fetch.embedded import EMBEDDED, cache_dir, embedded_path
from acformer.files import whole_folder
from acformer.images import load_image

SIDE, CROPS, LEAST_STAMP = 336, 13, 150
GROUND = (124, 116, 104)
PHOTOGRAPHS = {
    "lomiri-wallpapers-16.04": """Bridge_by_Sander_Klootwijk Dragonfly_by_Bolly Picture_0B_by_freespace
        Picture_1A_by_freespace Wine_by_Jakkub_Mede aitzgorri_by_Aitzol_Berasategi free_by_Peter_Nerlich
        friends_by_Aitzol_Berasategi greentock_by_Peter_Nerlich life_by_Aitzol_Berasategi
        picosdeeuropa_by_Aitzol_Berasategi seeding_by_Clements_Engelhardt sunset_by_Aitzol_Berasategi""",
    "lomiri-wallpapers-20.04": "Kleiber_by_Lukas_Baubkus",
    "mate-backgrounds": """Aqua Blinds Dune FreshFlower Garden GreenMeadow LadyBird RainDrops Storm TwoWings Wood
        YellowFlower""",
    "plasma-workspace-wallpapers": """BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf Grey Kite
        OneStandsOut Path summer_1am""",
}
STAMPS = "tuxpaint-stamps-default"
STAMP_FOLDERS = ("animals", "food/fruit", "food/nuts", "food/vegetables", "hobbies", "plants")
NO_PHOTOGRAPHS = ("cartoon", "bee", "fly", "echidna", "hedgehog", "shrimp")


def unpack(package: str, folder: Path) -> dict[str, str]:
    """Download a package and unpack it into `folder / package`; its name and version."""
    subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
    [archive] = folder.glob(f"{package}_*.deb")
    subprocess.run(["dpkg-deb", "-x", archive, folder / package], check=True)
    version = subprocess.run(["dpkg-deb", "-f", archive, "Version"], capture_output=True, text=True, check=True)
    archive.unlink()
    return {"package": package, "version": version.stdout.strip()}


def licence(tree: Path, package: str, file: Path) -> str:
    """Of a file, by the last paragraph of debian/copyright that names it (paths there are the source's)."""
    text = (tree / "usr/share/doc" / package / "copyright").read_text(encoding="utf-8")
    found = "unknown"
    for paragraph in text.split("\n\n"):
        fields = dict(line.split(":", 1) for line in _unfolded(paragraph) if ":" in line)
        patterns = [one for one in fields.get("Files", "").split() if not one.startswith("debian/")]  # the packaging
        if any(fnmatch(file.name, pattern.rpartition("/")[2]) for pattern in patterns):
            found = fields["License"].strip()
    return found


def _unfolded(paragraph: str) -> list[str]:
    return paragraph.replace("\n ", " ").splitlines()


def photograph(tree: Path, name: str) -> Path:
    """The largest picture of that name; in plasma-workspace-wallpapers the name is a folder's."""
    found = [*tree.glob(f"usr/share/backgrounds/**/{name}.jpg"), *tree.glob(f"usr/share/wallpapers/{name}/*/*/*.jpg")]
    return max(found, key=lambda path: (path.stat().st_size, path))


def cut(path: Path, name: str, out: Path) -> list[tuple[Path, tuple[int, int, int, int]]]:
    """Squares of 40 to 100 % of the shorter side, anywhere on the picture, and their boxes."""
    image, random = load_image(path), Random(name)
    made = []
    for number in range(CROPS):
        side = round(min(image.size) * random.uniform(0.4, 1))
        left, top = random.randint(0, image.width - side), random.randint(0, image.height - side)
        box = (left, top, left + side, top + side)
        target = out / name / f"{number:02d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=box).save(target)
        made.append((target, box))
    return made


def on_ground(path: Path, target: Path) -> None:
    """A stamp in the middle of a plain square, its longer side 80 % of it."""
    stamp = Image.open(path).convert("RGBA")
    scale = 0.8 * SIDE / max(stamp.size)
    stamp = stamp.resize((max(1, round(stamp.width * scale)), max(1, round(stamp.height * scale))))
    square = Image.new("RGB", (SIDE, SIDE), GROUND)
    square.paste(stamp, ((SIDE - stamp.width) // 2, (SIDE - stamp.height) // 2), stamp)
    target.parent.mkdir(parents=True, exist_ok=True)
    square.save(target)


def is_photographed(path: Path) -> bool:
    """Not a cartoon nor a silhouette, and large enough to be enlarged to the square."""
    return not {path.stem, *path.parts} & {*NO_PHOTOGRAPHS} and max(Image.open(path).size) >= LEAST_STAMP


def make(out: Path, work: Path) -> list[dict]:
    """All pictures into `out`; the entries of the manifest."""
    entries = []

    def note(target: Path, box: tuple | None, **source: str) -> None:
        entries.append({"picture": str(target.relative_to(out)), **source, "box": box})

    for package, names in PHOTOGRAPHS.items():
        source = unpack(package, work)
        for name in names.split():
            file = photograph(work / package, name)
            origin = {"file": str(file.relative_to(work)), "licence": licence(work / package, package, file)}
            for target, box in cut(file, name, out / "photographs"):
                note(target, box, **source, **origin)
    skimage = EMBEDDED["photographs"]
    for name in ("astronaut", "coffee"):
        for target, box in cut(embedded_path("photographs") / f"{name}.png", name, out / "photographs"):
            note(target, box, package=skimage.project, version=skimage.version, file=name, licence=skimage.licence)
    source = unpack(STAMPS, work)
    stamps = work / STAMPS / "usr/share/tuxpaint/stamps"
    for path in sorted(path for folder in STAMP_FOLDERS for path in (stamps / folder).rglob("*.png")):
        if is_photographed(path):
            target = out / "stamps" / f"{'-'.join(path.relative_to(stamps).with_suffix('').parts)}.png"
            on_ground(path, target)
            tree = work / STAMPS
            note(target, None, **source, file=str(path.relative_to(work)), licence=licence(tree, STAMPS, path))
    return entries


if __name__ == "__main__":
    folder = cache_dir() / "natural-images"
    print("downloading five packages, 330 MB in all; they are deleted when the pictures are cut")
    with TemporaryDirectory() as work, whole_folder(folder) as out:
        entries = make(out, Path(work))
        (out / "manifest.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    for kind in ("photographs", "stamps"):
        print(f"{sum(entry['picture'].startswith(kind) for entry in entries)} pictures -> {folder / kind}")
