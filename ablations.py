"""The papers' ablations on the toy, as a table: which trainings each compares, what its picture shows, and what the paper found.
run_ablations.py runs them."""

from dataclasses import dataclass

import toy_networks


@dataclass(frozen=True)
class Variant:
    """A row of a table: how a model is trained, and how videos are sampled from it."""

    train: str | None = ""  # flags of train_switch.py or train_sugar.py; None: the toy's own model, which was trained for longer
    sample: str = ""  # flags of sample.py


@dataclass(frozen=True)
class Finding:
    """The paper's claim, as an inequality between two rows: the mean of `score` is higher in `more` than in `less`.

    at: compared where the two rows' lines have the same value of this score ("under the same level of identity").
    margin: "without loss" of the score holds where `more` is not lower by this much.
    than: another two rows; that difference is larger than this one ("the performance gap becomes smaller").
    """

    claim: str
    score: str
    more: str
    less: str
    at: str = ""
    margin: float = 0.0
    than: tuple[str, str] | None = None


@dataclass(frozen=True)
class Ablation:
    """variants: the rows. control: the row that must know its subject, or nothing is judged. looks: do the texts ask for every look?
    sweep: flags of sample.py, with each of which every row is sampled; they make it a line. pictures: the scores of scatters' axes;
    without them there are bars. note: what a reader must know of it."""

    source: str
    method: str
    variants: dict[str, Variant]
    findings: tuple[Finding, ...]
    control: str
    pictures: tuple[tuple[str, str], ...] = ()
    looks: bool = False
    sweep: tuple[str, ...] = ("",)
    note: str = ""


SCORES = ("identity", "own_look", "motion", "background_exact", "look", "movement", "dino_i", "clip_i", "clip_t", "dynamic", "subject",
          "background")
SWITCH = Variant()
IMAGE, TEXT = (toy_networks.SCALES[name] for name in ("omega_image", "omega_text"))  # where a row names none, the toy's own
SWEEP = tuple(f"--omega-image {image:g}" for image in (1, IMAGE, TEXT))
MIX = "--strategy mix --p 0.5"
TSF, TSF_E = Variant("--strategy tsf"), Variant("--strategy tsf --design e")
OWN = Variant(None)
OF_ONE = ("What is compared are ways to sample from one model, the toy's own, so intervals tell of other subjects, texts and noise, not of "
          "other trainings.")
# "Under the same level of identity": more motion, closer to the text. By the papers' scores, and by the world's measures.
WORDS = {("dino_i", "dynamic"): ("DINO-I", "moves more (Dynamic degree)"),
         ("dino_i", "clip_t"): ("DINO-I", "follows the text better (CLIP-T)"),
         ("identity", "movement"): ("exact identity", "moves more"),
         ("identity", "motion"): ("exact identity", "more often does what the text says")}
LIKENESS = tuple(WORDS)
SLIGHTLY = "\"works slightly better\", read as: "


def moves(claim: str, more: str, less: str, margin: float = 0.0) -> tuple[Finding, Finding]:
    """By the world's measure, and by the paper's score."""
    return Finding(claim, "movement", more, less, margin=margin), Finding("and (Dynamic degree)", "dynamic", more, less, margin=margin)


def keeps(claim: str, more: str, less: str) -> tuple[Finding, Finding, Finding]:
    """The identity, by the paper's scores and by the world's measure."""
    return (Finding(f"{claim} (DINO-I)", "dino_i", more, less), Finding("and (CLIP-I)", "clip_i", more, less),
            Finding("and (exact identity)", "identity", more, less))


def better(one: str, other: str, said: str = "", than: tuple[str, str] | None = None) -> tuple[Finding, ...]:
    """At the same likeness one moves more and follows the text better, by the paper's scores and by the world's measures.
    than: by more than there."""
    beside = f", by more than {than[0]} than {than[1]}" if than else ""
    return tuple(Finding(f"{said}at the same {of} {one} {what} than {other}{beside}", score, one, other, at, than=than)
                 for (at, score), (of, what) in WORDS.items())


ABLATIONS = {
    "switch-strategy": Ablation("Switch, Table 2", "switch", {
        "image-only": Variant("--strategy image-only"), "two-stage": Variant("--strategy two-stage"), "switching": SWITCH}, (
        *moves("trained on images only, the subject moves less", "switching", "image-only"),
        *moves("two stages move more than switching", "two-stage", "switching"),
        *keeps("switching keeps the identity better than images only", "switching", "image-only"),
        Finding("two stages inflate the likeness (DINO-I)", "dino_i", "two-stage", "switching"),
        Finding("and (CLIP-I)", "clip_i", "two-stage", "switching"),
        Finding("two stages forget the subject (exact identity)", "identity", "switching", "two-stage"),
        Finding("two stages forget the text (CLIP-T)", "clip_t", "switching", "two-stage")), "switching"),
    "switch-temporal": Ablation("Switch, Table 3, by exact motion in place of FVD", "switch", {
        "base on the videos": Variant("--strategy video-only"), "image-only": Variant("--strategy image-only"),
        "two-stage": Variant("--strategy two-stage"), "switching": SWITCH}, (
        Finding("switching models motion better than images only", "motion", "switching", "image-only"),
        Finding("switching models motion better than two stages", "motion", "switching", "two-stage"),
        Finding("switching models motion better than the base on the videos", "motion", "switching", "base on the videos"),
        Finding("images only model it worse than the base on the videos", "motion", "base on the videos", "image-only"),
        Finding("two stages model it worse than images only", "motion", "image-only", "two-stage")), "switching",
        note="The paper's protocol, from the first frame and by classes of motion, is `evaluate.py motion`. Of the base on the videos its "
        "text says \"compatible\" and \"comparable\", its table that switching is better; we test the table."),
    "switch-frame": Ablation("Switch, Figure 6", "switch", {
        "first frame, no dropping": Variant("--reference-frame first --reference-drop 0"),
        "random frame, no dropping": Variant("--reference-drop 0"), "random frame, dropping": SWITCH}, (
        *moves("the first frame alone makes videos that move less (\"near-static\")", "random frame, dropping", "first frame, no dropping"),
        *moves("a random frame brings some of the motion back", "random frame, no dropping", "first frame, no dropping"),
        Finding("the first frame alone inflates DINO-I", "dino_i", "first frame, no dropping", "random frame, dropping"),
        Finding("and CLIP-I", "clip_i", "first frame, no dropping", "random frame, dropping"),
        Finding("a random frame alone costs likeness (DINO-I)", "dino_i", "first frame, no dropping", "random frame, no dropping"),
        Finding("and (CLIP-I)", "clip_i", "first frame, no dropping", "random frame, no dropping"),
        Finding("dropping takes away the artifacts of a random frame alone (exact identity)", "identity", "random frame, dropping",
                "random frame, no dropping")),
        "random frame, dropping", note="The paper shows artifacts in pictures; here the exact identity stands for them."),
    "switch-cls": Ablation("Switch, Table 5", "switch", {"without <cls>": Variant("--no-cls"), "with <cls>": SWITCH}, (
        *keeps("<cls> helps the identity", "with <cls>", "without <cls>"),
        *moves("<cls> gives more motion", "with <cls>", "without <cls>"),
        Finding("without it, the text is met a little better (CLIP-T)", "clip_t", "without <cls>", "with <cls>")), "with <cls>",
        note="Every caption of the toy has the same noun, so <cls> says nothing that is not known: a weak test."),
    "switch-t2v": Ablation("Switch, Table 6", "switch", {"T2V": Variant("--reference-drop 1"), "I2V": SWITCH}, (
        *keeps("I2V keeps the identity better", "I2V", "T2V"),
        *moves("I2V moves more", "I2V", "T2V"),
        Finding("T2V follows the text better (CLIP-T)", "clip_t", "T2V", "I2V")), "I2V"),
    "switch-videos": Ablation("Switch, Table 7, a tenth of its counts", "switch", {
        **{f"{n} videos": Variant(f"--videos {n}") for n in (100, 200, 300)}, "400 videos": SWITCH}, (
        *keeps("four times the videos: better identity", "400 videos", "100 videos"),
        *moves("four times the videos: more motion", "400 videos", "100 videos"),
        *moves("a quarter is already relatively strong, read as: moves no less", "100 videos", "400 videos", margin=0.05)), "400 videos",
        note="The paper's text says \"steadily improves\"; in its table the dynamic degree goes 59.66, 52.25, 55.46, 60.19."),
    "switch-p": Ablation("Switch, Table 8", "switch", {"p = 0": Variant("--strategy image-only"), "p = 0.2": SWITCH,
        **{f"p = {p}": Variant(f"--p {p}") for p in (0.4, 0.6)}}, (
        *moves("without video steps there is less motion (in its table next to none)", "p = 0.2", "p = 0"),
        *keeps("with video steps the identity is better", "p = 0.2", "p = 0"),
        *keeps("and with twice as many", "p = 0.4", "p = 0"),
        *keeps("many video steps strengthen the identity further", "p = 0.6", "p = 0.2"),
        *moves("and the motion stays", "p = 0.6", "p = 0.2", margin=0.05)), "p = 0.2",
        note="For p = 0 the paper's table has a dynamic degree of 0.84, a CLIP-I of 71.15 and a DINO-I of 43.19, as its Table 2, and its "
        "text 63.03, 72.86 and 57.86; we test the table. "
        "That more video steps strengthen the identity is from A.4; 3.5 expects the opposite."),
    "sugar-guidance": Ablation("SUGAR, Table 1", "sugar", {
        f"image {image:g}": Variant(None, f"--omega-image {image:g}") for image in (TEXT, IMAGE, 2, 1.5, 1)}, (
        Finding("a lower image scale follows the text better (CLIP-T)", "clip_t", "image 1", f"image {TEXT:g}"),
        Finding("and (exact look)", "look", "image 1", f"image {TEXT:g}"),
        *moves("a lower image scale moves more", "image 1", f"image {TEXT:g}"),
        Finding("a higher image scale keeps the identity better (DINO-I)", "dino_i", f"image {TEXT:g}", "image 1"),
        Finding("and (exact)", "identity", f"image {TEXT:g}", "image 1"),
        Finding("and the subject is more consistent", "subject", f"image {TEXT:g}", "image 1"),
        Finding("and the background", "background", f"image {TEXT:g}", "image 1")),
        f"image {IMAGE:g}", LIKENESS, looks=True, note=f"The text's scale is {TEXT:g}, where the paper's is 7.5. {OF_ONE}"),
    "sugar-equation": Ablation("SUGAR, section 3.2: equations 1 to 4", "sugar", {
        "equation 1": Variant(None, "--equation 1"), "equation 2": OWN,
        "equation 3": Variant(None, "--equation 1 --t-bar 900"), "equation 4": Variant(None, "--t-bar 900 --drop dino")},
        (*better("equation 2", "equation 1", SLIGHTLY), *better("equation 4", "equation 3", SLIGHTLY)), "equation 2", LIKENESS, looks=True,
        sweep=SWEEP, note="Of which score it works slightly better the paper does not say; equations 3 and 4 drop DINO above t = 900. "
        + OF_ONE),
    "sugar-design": Ablation("SUGAR, Figure 5", "sugar", {
        f"design ({design})": Variant(MIX + f" --design {design}" * (design != "b")) for design in "abcde"}, (
        Finding("(a) never sees the subject (DINO-I)", "dino_i", "design (b)", "design (a)"),
        Finding("and (exact identity)", "identity", "design (b)", "design (a)"),
        Finding("in (b), where one frame sees the subject, its identity is not lost (DINO-I)", "dino_i", "design (b)", "design (e)",
                margin=0.05),
        Finding("and (exact identity)", "identity", "design (b)", "design (e)", margin=0.05),
        *better("design (b)", "design (c)"), *better("design (b)", "design (d)"), *better("design (b)", "design (e)")),
        "design (b)", LIKENESS, sweep=SWEEP),
    "sugar-design-tsf": Ablation("SUGAR, Figure 11", "sugar", {
        "design (b), Mix": Variant(MIX), "design (e), Mix": Variant(f"{MIX} --design e"), "design (b), TSF": TSF, "design (e), TSF": TSF_E},
        (*better("design (b), TSF", "design (e), TSF"),
         *better("design (b), Mix", "design (e), Mix", "TSF makes the gap smaller: ", than=("design (b), TSF", "design (e), TSF"))),
        "design (b), TSF", LIKENESS, sweep=SWEEP),
    "sugar-strategy": Ablation("SUGAR, Figure 6", "sugar", {
        **{f"Mix, p = {p}": Variant(f"--strategy mix --p {p} --design e") for p in (0, 0.5, 1)},
        "TS": Variant("--strategy ts --design e"), "TSF": TSF_E}, (
        Finding("real videos alone cannot change the look", "look", "Mix, p = 0.5", "Mix, p = 0"),
        *(Finding(f"real videos alone follow the text worse than {other} (CLIP-T)", "clip_t", other, "Mix, p = 0")
          for other in ("Mix, p = 0.5", "Mix, p = 1", "TS", "TSF")),
        *moves("synthetic videos in the mix cost motion", "Mix, p = 0", "Mix, p = 0.5"),
        *moves("synthetic videos alone move less (hardly)", "Mix, p = 0", "Mix, p = 1"),
        *moves("freezing the first half moves more than not (assumed in 3.2)", "TSF", "TS"),
        *moves("both kinds are better than synthetic videos alone (3.2): they move more", "Mix, p = 0.5", "Mix, p = 1"),
        *moves("TSF moves more than Mix, p = 0.5", "TSF", "Mix, p = 0.5"), *moves("TSF moves more than Mix, p = 1", "TSF", "Mix, p = 1"),
        Finding("and follows the text no less (CLIP-T)", "clip_t", "TSF", "Mix, p = 0.5", margin=0.01),
        *moves("TSF moves no less than real videos alone", "TSF", "Mix, p = 0", margin=0.05),
        Finding("TSF still changes the look", "look", "TSF", "Mix, p = 0")),
        "TSF", (("look", "movement"), ("clip_t", "dynamic")), looks=True,
        note="Mix takes as many steps as the two stages together."),
    "sugar-synthetic": Ablation("SUGAR, Figure 7", "sugar", {
        "TSF-Video": TSF_E, "TSF-Image": Variant("--strategy tsf --design e --synthetic image")}, (
        Finding("synthetic videos follow the text better than synthetic images (CLIP-T)", "clip_t", "TSF-Video", "TSF-Image"),
        Finding("and the asked look (exact)", "look", "TSF-Video", "TSF-Image"),
        Finding("at the same subject consistency they move more (Dynamic degree)", "dynamic", "TSF-Video", "TSF-Image", at="subject"),
        Finding("and (movement)", "movement", "TSF-Video", "TSF-Image", at="subject")),
        "TSF-Video", (("subject", "dynamic"), ("subject", "movement"), ("clip_t", "dynamic"), ("look", "movement")), looks=True,
        sweep=SWEEP),
    "sugar-drop": Ablation("SUGAR, Figure 9", "sugar", {
        "nothing dropped": OWN, **{f"{what} dropped": Variant(None, f"--t-bar 900 --drop {what}") for what in ("dino", "clip", "both")}}, (
        *moves("dropping DINO early moves more", "dino dropped", "nothing dropped"),
        Finding("without loss of identity (DINO-I)", "dino_i", "dino dropped", "nothing dropped", margin=0.05),
        Finding("and (exact identity)", "identity", "dino dropped", "nothing dropped", margin=0.05),
        Finding("or of what the text asks for (CLIP-T)", "clip_t", "dino dropped", "nothing dropped", margin=0.01),
        Finding("and (exact look)", "look", "dino dropped", "nothing dropped", margin=0.05),
        *moves("dropping both moves more", "both dropped", "nothing dropped"),
        Finding("and follows the text better (CLIP-T)", "clip_t", "both dropped", "nothing dropped"),
        Finding("and (exact look)", "look", "both dropped", "nothing dropped"),
        Finding("dropping both loses identity (DINO-I)", "dino_i", "nothing dropped", "both dropped"),
        Finding("and (exact identity)", "identity", "nothing dropped", "both dropped")), "nothing dropped",
        (("dino_i", "dynamic"), ("clip_t", "dynamic"), ("identity", "movement"), ("look", "movement")), looks=True,
        note="Of dropping CLIP alone the paper's text says nothing. " + OF_ONE),
    "sugar-drop-training": Ablation("SUGAR, Figure 9, a model trained without dropping", "sugar", {
        "trained with dropping": TSF, "the same, DINO dropped early": Variant(TSF.train, "--t-bar 900 --drop dino"),
        "trained without dropping": Variant("--strategy tsf --drop-dino 0 --drop-clip 0")}, (
        *moves("dropping in training and early in sampling moves more than never dropping", "the same, DINO dropped early",
               "trained without dropping"),
        Finding("without loss of identity (DINO-I)", "dino_i", "the same, DINO dropped early", "trained without dropping", margin=0.05),
        Finding("and (exact identity)", "identity", "the same, DINO dropped early", "trained without dropping", margin=0.05),
        Finding("or of what the text asks for (CLIP-T)", "clip_t", "the same, DINO dropped early", "trained without dropping",
                margin=0.01)),
        "trained with dropping", note="That the model trained without dropping is what the others of Figure 9 are compared with is our "
        "reading. It has never seen its null embeddings, which guidance subtracts."),
}
SEEDS, VIDEOS, SAMPLING_STEPS = 3, 64, 25  # full length: with less there is no verdict
QUICK = ("--steps 4 --micro-batch 4", {"switch": "--image-batch 4 --video-batch 2 --images 8 --videos 4",
                                       "sugar": "--batch 4 --real 4 --triplets 4"})
