"""What evaluation asks for. `sks` stands for the subject's noun.

SUGAR's prompts are those of its Figures 19 to 21: 18 for each of three kinds of subject. Two of the lists reached us damaged; what
was restored by the third, which is whole and runs in parallel, is in RESTORED. Switch's are unpublished: SWITCH is ours.
"""

OF_ALL = (  # the last eight of each kind
    "a sks under a cascading waterfall",
    "a sks in watercolor painting style, with colors naturally spreading and blending",
    "sks is floating in an ocean of milk",
    "a red sks is sliding down on the slide",
    "a sks as a pencil sketch style painting drawn by a hand",
    "sks as an animated flat vector illustration",
    "sks made of gold, zoom out camera view",
    "sks made of crystal ice, on a frozen lake, rotating view")
SUGAR = {
    "animal": (  # Figure 21
        "sks wears high-tech combat suit, is walking in a cyberpunk city with neon signs",
        "sks wearing wizard robe is walking with northern light in the background",
        "sks wearing green hoodie is skateboarding in Japanese anime style, in a windy day",
        "sks is dancing, wearing plate armor, in the autumn forest with falling leaves",
        "a sks is floating in the outer space, wearing astronaut suit, with galaxy in the background",
        "a sks is skateboarding in front of Eiffel tower",
        "sks is running on busy Tokyo street at night",
        "sks is dancing with snow mountain in the background, in snowy day",
        "a green sks is flying in clouds",
        "a sks walking on the beach at sunset, in oil painting style",
        *OF_ALL),
    "active object": (  # Figure 19
        "sks is walking in a cyberpunk city with neon signs",
        "sks is walking with northern light in the background",
        "sks is skateboarding in Japanese anime style, in a windy day",
        "sks is skateboarding in the autumn forest with falling leaves",
        "a sks is floating in the outer space, with galaxy in the background",
        "a sks is skateboarding in front of Eiffel tower",
        "sks is skateboarding on busy Tokyo street at night",
        "sks is skateboarding with snow mountain in the background, in snowy day",
        "a green sks is flying in clouds",
        "a sks walking on the beach at sunset, in oil painting style",
        *OF_ALL),
    "static object": (  # Figure 20
        "sks in a cyberpunk city with neon signs",
        "sks with northern light in the background",
        "sks in Japanese anime style, in a windy day",
        "sks in the autumn forest with falling leaves",
        "a sks is floating in the outer space, with galaxy in the background",
        "a sks is in front of Eiffel tower",
        "sks is on busy Tokyo street at night",
        "sks with snow mountain in the background, in snowy day",
        "a green sks is flying in clouds",
        "a sks on the beach at sunset, in oil painting style",
        *OF_ALL),
}
# (kind, number) of what is not as printed. Active objects: 16 are printed, "auter" for "outer" (4), the Eiffel tower a second time
# (6) and "sks is skateboarding in clouds" (7) where Tokyo and the mountain belong, no beach (9), no slide (13). Static objects:
# "cyberpaink" (0) and "fornt" (5) are misspelt, and the waterfall is printed twice where the illustration is missing (15).
RESTORED = {("active object", 4), ("active object", 6), ("active object", 7), ("active object", 9), ("active object", 13),
            ("static object", 0), ("static object", 5), ("static object", 15)}

SWITCH = {  # four for each class of DreamBench: 30 x 4 in all
    "dog": ("a sks is running along the shore, splashing through shallow waves",
            "a sks catches a frisbee in a sunny park", "a sks shakes the snow off its fur in a pine forest",
            "a sks looks out of the window of a moving train"),
    "cat": ("a sks chases a butterfly across a flower garden", "a sks walks along the top of a brick wall at dusk",
            "a sks plays with a ball of yarn on a living room carpet", "a sks stretches and yawns on a windowsill in the rain"),
    "stuffed animal": ("a sks rides on a merry-go-round at a fair", "a sks bounces on a bed with white sheets",
                       "a sks sits in a toy boat that drifts down a stream", "a sks waves from a shelf in a toy shop"),
    "toy": ("a sks rolls across a wooden floor towards the camera", "a sks marches through a sandbox, leaving a trail",
            "a sks spins on a turntable under studio lights", "a sks floats in a bathtub among soap bubbles"),
    "cartoon": ("a sks dances on a stage under coloured lights", "a sks runs through a field of tall grass",
                "a sks jumps from roof to roof over a city at night", "a sks surfs a big wave in the sun"),
    "backpack": ("a sks swings on a hook in a school corridor", "a sks rides on a luggage belt at an airport",
                 "a sks lies on a mountain ledge while clouds pass", "a sks is carried through a crowded market"),
    "bowl": ("a sks is filled with milk in slow motion", "a sks slides along a kitchen counter",
             "a sks turns on a potter's wheel", "a sks floats on a pond among lilies"),
    "can": ("a sks rolls down a street in the wind", "a sks is lifted out of a bucket of ice",
            "a sks opens with a spray of foam on a beach table", "a sks turns slowly on a mirror under neon light"),
    "candle": ("a sks flickers on a table during a thunderstorm", "a sks is carried through a dark castle hall",
               "a sks floats on a lake among lanterns", "a sks burns on a birthday cake while confetti falls"),
    "clock": ("a sks rings and shakes on a bedside table", "a sks falls onto a pillow in slow motion",
              "a sks ticks on a desert rock as the sun sets", "a sks drifts through space past the moon"),
    "sneaker": ("a sks splashes into a puddle on a city street", "a sks runs up a flight of stone stairs",
                "a sks turns in the air above a basketball court", "a sks kicks up sand on a beach"),
    "boot": ("a sks stomps through autumn leaves", "a sks steps into fresh snow", "a sks walks along a catwalk under flashing lights",
             "a sks splashes through a muddy stream"),
    "glasses": ("a pair of sks slides down a sand dune", "a pair of sks sinks through clear blue water",
                "a pair of sks is put down on an open book in a garden", "a pair of sks turns in the light of a disco ball"),
    "teapot": ("a sks pours steaming tea into a cup", "a sks whistles on a camp fire in the woods",
               "a sks rides on a tray through a busy cafe", "a sks floats in the clouds above a green valley"),
    "vase": ("a sks turns slowly on a pedestal in a museum", "a sks is filled with tulips on a kitchen table",
             "a sks wobbles on a shelf of a passing train", "a sks stands on a balcony while rain falls"),
}
