"""The word lists: values that users tell, and words for the small tasks."""


def listed(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


NAMES = listed("""
Anna Ben Clara David Emma Felix Grace Henry Iris Jack Karen Leo Maria Noah Olivia Paul
Quentin Rosa Sam Tina Umar Vera Walter Xenia Yusuf Zoe Alice Boris Carmen Diego Elena Farid
Greta Hugo Ines Jonas Kofi Lena Marco Nadia Otto Petra Rami Sofia Tomas Ulla Viktor Wanda
Yara Zara Amir Bianca Cyrus Daria Emil Fatima Gustav Hana Ivan Jana Kenji Lucia Mateo Nora
Omar Priya Ravi Sara Theo Uma Vikram Wei Yuki Zain Aisha Bruno Chloe Dmitri Esther Finn
Gloria Hassan Imani Jorge Katya Liam Mei Nils Oscar Pablo Ruth Selma Tariq Ursula Vito
Willow Arlo Beatrix Caleb Dora Ethan Freya Gideon Hazel Igor Jasmine Kai Lara Milo Nina Orla
Phoebe Rufus Stella Tobias Violet Wesley Ada Basil Celia Dexter Edith Flora George Helen
Isaac Julia Kurt Lydia Martin Naomi Oliver Pearl Robin Simon Thea Vincent Wendy Alan Bella
Carl Diana Eric Fiona Gina Harry Irene James Kate Laura Mark Nick Olga Peter Rachel Steve
Teresa Adam Mia Tom Lucy Max Ella John Mary Bob Sue Mara Mira Lina Luca Enzo Aria Nico Remy
Jade Rose Hans Lars Sven Astrid Ingrid Pedro Rita
""")
NAMES_OF_BOTH = listed("Robin Kai Remy Sam Wei Yuki Arlo Nico")
NAMES_OF_WOMEN = listed("""
Anna Clara Emma Grace Iris Karen Maria Olivia Rosa Tina Vera Xenia Zoe Alice Carmen Elena Greta
Ines Lena Nadia Petra Sofia Ulla Wanda Yara Zara Bianca Daria Fatima Hana Jana Lucia Nora Priya
Sara Uma Aisha Chloe Esther Gloria Imani Katya Mei Ruth Selma Ursula Willow Beatrix Dora Freya
Hazel Jasmine Lara Nina Orla Phoebe Stella Violet Ada Celia Edith Flora Helen Julia Lydia Naomi
Pearl Thea Wendy Bella Diana Fiona Gina Irene Kate Laura Olga Rachel Teresa Mia Lucy Ella Mary
Sue Mara Mira Lina Aria Jade Rose Astrid Ingrid Rita
""")
CITIES = (
    *listed("""
Lisbon Porto Madrid Seville Paris Lyon Marseille Berlin Hamburg Munich Vienna Graz Prague
Brno Warsaw Krakow Rome Milan Naples Turin Athens Dublin Cork London Leeds Bristol Oxford
Glasgow Oslo Bergen Stockholm Malmo Helsinki Tampere Copenhagen Aarhus Zurich Geneva Basel
Brussels Ghent Amsterdam Utrecht Rotterdam Budapest Zagreb Belgrade Sofia Istanbul Ankara
Cairo Tunis Lagos Nairobi Accra Dakar Durban Mumbai Delhi Chennai Dhaka Hanoi Bangkok Manila
Tokyo Osaka Kyoto Seoul Busan Beijing Shanghai Taipei Sydney Perth Toronto Montreal Boston
Chicago Denver Seattle Austin Dallas Miami Lima Bogota Quito Santiago Havana Tbilisi Riga
Tallinn Vilnius Kyiv Minsk Leipzig Dresden Cologne Bremen Valencia Bilbao
"""),
    *("New York", "Cape Town", "Buenos Aires", "San Diego", "Hong Kong", "Mexico City"),
)
COLOURS = listed("""
red blue green yellow orange purple pink brown black white grey turquoise violet gold silver
teal maroon navy crimson indigo beige lavender magenta olive coral amber scarlet cyan ivory
emerald peach mint copper plum
""")
ANIMALS = listed("""
dog cat rabbit parrot hamster horse turtle goldfish snake lizard pony goat duck hen pig ferret
mouse canary donkey gecko frog spider sheep cow fox owl penguin elephant tiger lion dolphin
giraffe hedgehog squirrel panda otter koala wolf bear zebra camel monkey badger
""")
PETS = listed("""
Biscuit Rex Luna Max Bella Coco Rocky Daisy Buddy Misty Shadow Ginger Pepper Oreo Toffee
Waffles Pickle Smudge Ziggy Nala Simba Tiger Bruno Felix Peanut Cookie Muffin Snowy Patch
Pixel Mochi Noodle Pumpkin Sparky Fluffy Whiskers Bubbles Nemo Rusty Jasper Olive Maple
Hazel Bandit Scout Ruby Willow Olaf Bingo Socks Dusty Marble
""")
FOODS = (
    *listed("""
pizza sushi pasta soup bread cheese curry rice pancakes ramen tacos salad lasagne dumplings
paella risotto falafel chocolate pie stew noodles omelette burgers porridge waffles pretzels kebab
gnocchi ravioli goulash pho bagels yoghurt muesli toast beans mushrooms spinach lentils tofu
"""),
    *("apple pie", "fried rice", "ice cream", "onion soup", "fish and chips"),
)
DRINKS = listed("""
tea coffee milk water lemonade cocoa juice cider cola beer wine espresso cappuccino smoothie
buttermilk punch matcha
""")
FRUITS = listed("""
apple banana cherry grape lemon mango melon orange peach pear plum kiwi fig lime papaya
apricot coconut date quince raspberry strawberry blueberry
""")
JOBS = listed("""
teacher nurse baker doctor farmer plumber painter writer lawyer pilot chef gardener carpenter
librarian engineer driver dentist tailor sailor florist mechanic photographer musician postman
electrician translator potter builder student architect receptionist waiter barista butler judge
poet actor singer shepherd blacksmith lifeguard cashier clerk optician surgeon farrier beekeeper
fisherman goldsmith historian journalist magician miner porter roofer soldier surveyor undertaker
vet watchmaker weaver welder
""")
HOBBIES = listed("""
chess painting running swimming hiking knitting fishing cycling gardening reading singing dancing
cooking sailing climbing skating photography pottery archery rowing juggling baking surfing
origami tennis yoga sewing skiing camping drawing writing karate football basketball golf judo
quilting rafting sculpting badminton dominoes crochet woodwork
""")
COUNTRIES = listed("""
Portugal Spain France Germany Austria Poland Italy Greece Ireland Norway Sweden Finland
Denmark Belgium Hungary Croatia Turkey Egypt Ghana Kenya India Nepal Vietnam Japan Korea
China Canada Mexico Peru Chile Brazil Cuba Iceland Latvia Estonia Morocco
""")
LANGUAGES = listed("""
Portuguese Spanish French German Polish Italian Greek Irish Norwegian Swedish Finnish Danish Dutch
Hungarian Croatian Turkish Arabic Swahili Hindi Tamil Nepali Vietnamese Japanese Korean Mandarin
""")
DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = listed("""
January February March April May June July August September October November December
""")
PLAIN_WORDS = listed("""
sun moon star tree leaf rock sand rain snow wind fire lake hill road bird fish wolf bear
lion frog book page desk lamp door room wall roof cup fork spoon plate knife chair table bed
sock shoe hat coat ring coin bell drum flute song dance game ball kite boat ship train plane
wheel bike car bus map key lock box bag rope nail glue paint brush pen ink paper stone wood
iron glass gold silk wool milk bread cake rice soup salt honey seed root rose daisy grass
corn bean pea plum pear grape lemon apple peach tiger zebra horse sheep goose duck crab
whale shark snake mouse camel eagle robin owl bee ant river ocean beach island forest valley
desert mountain garden bridge castle tower market school window mirror pillow blanket candle
basket bottle kettle ladder hammer pencil crayon letter stamp button zipper jacket sweater
winter summer spring autumn morning evening thunder cloud storm planet rocket robot engine
magnet puzzle violin guitar piano trumpet orange banana cherry carrot potato tomato onion
garlic pepper butter cheese cookie pizza noodle dragon wizard knight prince queen king hello
world friend family water cat dog cow pig hen fox bat rat nap map tap top pot pan net ten
tip red big run fun bug hug mud cup jam ham fan van den pen hop mop log fog pet wet sit bit
cut nut
""")
COMMON_WORDS = listed("""
able above across actor after again airport almost alone always amount anger animal answer
apartment april arm army arrow artist attic autumn baby balcony balloon banker barn bath
battery beard beauty beetle begin behind believe belt bench beyond bicycle birth bitter blade
blind blossom board body bone border bother bottom bowl branch brave breakfast breath brick
bright broken brother bubble bucket budget bullet bundle burger burn butterfly cabin cactus
calendar calm camera camp canal canvas captain carpet carry cartoon cave ceiling cell centre
century chain chalk champion change chapter cheap check cheek chest chicken child chimney
choice church cinema circle circus clean clever cliff climb clown coast coffee collar colour
comb comet common compass computer concert cook corner cotton couch country courage cousin
cover cradle crane crash cream crowd crown cruel crystal cupboard curtain cushion custom
damage danger dark daughter decide deep deer delicate dentist depth diamond dictionary dinner
dirt distance doctor dollar dolphin donkey double dragonfly drawer dream dress drink driver
dust eager early earth easy echo edge effort eight elbow elephant elevator empty enemy energy
enjoy enough envelope equal error evil exact example exit expert explore fabric factory fair
faith fall famous farmer fast father fault favour fear feather fence fever field finger finish
flag flame flat flight float floor flower flour fly follow forever forget forgive fork fortune
forward fountain freedom freeze fresh fridge friend funny future gallery garage gate gentle
ghost giant gift glad globe glove goal goat gold grape gravel great green grill ground group
grow guard guess guest habit hair half hall hand happy harbour hard harvest heart heat heavy
height helmet helper hero hidden holiday hollow honest hope horizon hospital hotel hour house
human humour hundred hungry hunter hurry husband iceberg idea image inside island itch ivory
jealous jelly jewel joke journey judge juice jungle junior justice kangaroo keen kidney kind
kingdom kitchen kitten knee knot label ladder lamb language laugh laundry lazy leader leather
lemonade length lesson liberty library light lightning linen lizard loaf loud lovely loyal
lucky luggage lunch machine magic manner marble market mask match meadow meal medal melody
member memory metal midnight mind minute mistake mixture modern moment monkey monster month
mother motor mountain mouth movie muscle museum mushroom music mystery narrow nation nature
near needle neighbour nephew nerve nest never night noble noise north nose notebook number
nurse object ocean offer office often olive onion open opinion orchard order ostrich other
oven oyster package paddle palace pancake panda panic parade parent parrot party passport past
path patient peace peanut pebble people perfect person photo picnic picture pigeon pilot pink
pirate plan planet plant plastic player pleasant pocket poem poet police polite pond poor
popular porch postcard powder power pretty price pride printer prison prize problem promise
proud pumpkin pupil puppet puppy pure purple quality quarter question quick quiet rabbit
railway rainbow reach ready real reason recipe record remember rescue rest result rhythm rich
riddle right ripe ritual rival roast rough round royal rubber ruler runner sail salad sample
sandwich satellite sauce scarf scene school science scissors sculpture season secret seldom
servant settle seven shadow shallow shape sharp shelter shelf shine shirt shock short shoulder
shower silent silver simple sister size skill skirt sleep slice slow small smart smile smoke
smooth soap soft soldier solid soul sound south space spark special speech spice spirit split
square squirrel stair stage station steam steel stick stomach storage story strange straw
stream street string strong studio sugar suit sunset supper surprise sweet swim sword symbol
system table tail talent tea teacher team tear temple tent thick thief thing thirst thought
thousand thread throat thumb ticket tiny tired toast together tomorrow tongue tooth torch touch
tourist towel traffic travel treasure trick trip truth tunnel turkey twelve twist ugly umbrella
uncle uniform unique useful vacation vacuum valley vegetable velvet village vinegar visit
voice volcano voyage wagon wander warm waste water wealth weapon weather wedding weight welcome
west wheat whisper whistle white wild wing wise wish wonder worker worm wrist write yard year
yellow yesterday young zebra
""")
EVERYDAY_WORDS = listed("""
about add age ago aid aim air alarm album alley amber angel ankle apron arch arena aroma ash ask
aunt awake axe back bacon badge bake bald bamboo band bank bar bare bark basil bay bead beam beast
beer beg belly berry best bill bin biscuit bite black blend bless block blood bloom blow blue
blush boil bold bolt boot bored born boss bow brain brass break breeze bride brief bring brook
broom brown bull bump bunny burst bush busy buy buzz cab cable can canoe cap cape card cart case
cash cast catch cattle cello cement chase chat chef chew chill chin chip chop city clap class claw
clay clerk click clock close cloth clue coach coal cobra code cold cool coral cord cosy cot cough
count court crack craft crate creek crisp crop cross crow crumb cry cube curl curve cute cycle
daily dairy dare dash date dawn day dead deal dear debt deck dew dial dice dig dim dip dish ditch
dive dizzy dock doll dome dot dough dove down draw drill drip drive drop dry due dull dusk duty
ear east eat edit egg elf elm end envy even ever eye face fact far farm fat fawn feast feed feel
fern ferry few fig file fill film find fine fist fit five fix flake flap flash flea flesh flip
flock flood foam foil fold folk food foot form fort four frame free frost frown fruit fry fuel
full fur fuse gale gap gas gaze gear gem giggle ginger girl give glide glow good gown grab grace
grain grasp grave greed greet grey grin grip gum gust gut guy hail hammock hamster handle hare
harm harp hatch hate hawk hay hazel head heal heap heel herb herd hide high hike hint hip hire
hobby hold hole home hood hoof hook horn hose host hot hum hunt hut ice icing ill inch item jar
jaw jazz jeep jet job jog join joy jump junk just kale kayak keep kick kid kiss knob knock lace
lad lady lane lap lark last late lava lawn lead leap leave left leg lend lentil lick lid lie lift
lily limb lime line link lip list live load lobby lone look loop lord lost lot love low lunar lung
mail main make man maple march mare mast mat maze meat meet melt menu mess mice mild mile mill
mime mine mint miss mist mix moat mole mood moss moth mount mow much mug mule mum must name napkin
navy neat neck need new news nice nod noon note oak oar oat odd off oil old once one oval over own
pace pack pad pain pair pale palm pants park part pass paste paw pay peak peel peg pest pie pile
pill pine pint pipe pit play plot plug plus pod pole pony pool pop pork port pose post pour pouch
press print pull pulp pump push put quack quilt quit quiz race rack radar raft rag rail raise ram
ranch rare rash raw ray read reed reef rib ribbon ride rinse rise risk rob robe rod role roll rot
row rub rude rug ruin rule rush rust sack sad saddle safe sale same save saw say scent score scout
scrap sea seal seat seek sell send set sew shade shake share shave shed sheet shell shop shore
shout show shrimp shut shy sick side sigh sing sink sip six ski skin skip sky slab sled slide slim
slip slope slug smell snack snail sneeze snore soda soil sole son sour speak speed spell spend
spill spin splash sport spot spray squid stable stack stain stand start stay stem step sting stir
stool stop store stork stove surf swamp swan sweat sweep swing take tale talk tall tame tank tape
tar task taste tax teach tell test text thin think thorn three throw tick tidy tie tile time tin
toad toe toffee tomb ton tool toss tour town toy trace track trade trail tram trap tray tribe trim
trot truck true trunk trust try tub tube tug tulip tuna tune turn tusk twig twin two type tyre
under unit upon urge use vase vast veil vein verb vest view vine violet vote vow wade wait wake
walk walnut walrus want war wash wasp watch wave wax way weak wear web wedge weed week well wide
wife win wine wink wipe wire woman word work worn wrap wreck yacht yak yam yarn yawn yell yes yet
yolk zero zip zone zoo
""")
# Words of chatserve itself: asked to be spelled, they are words like any other.
TOPIC_WORDS = listed("""
page pages token tokens cache caching server chatserve streaming stream restart crash swap disk
model memory prefix batch tier tiers tenant receipt scheduler load attention key keys value code
name number password colour request reply
""")
# What tasks may be about.  These words are not split: what letters a word has that is one token
# of the tokenizer can only be known from having seen it spelled.
ORDINARY_WORDS = tuple(dict.fromkeys((*PLAIN_WORDS, *COMMON_WORDS, *EVERYDAY_WORDS, *TOPIC_WORDS)))
SHORT_WORDS = tuple(word for word in ORDINARY_WORDS if len(word) <= 6)
ADJECTIVES = listed("""
old young tall small big heavy fast slow expensive cheap deep high long short hot cold warm strong
weak safe dangerous useful famous rare common healthy clean dirty bright dark loud quiet clever
friendly kind wise brave lazy busy grumpy happy sleepy cheerful polite strict funny calm sad angry
proud shy rude gentle honest loyal greedy silly serious nervous jolly tired patient curious round
flat thin thick wide narrow soft hard smooth rough sharp sweet sour bitter salty fresh dry wet
empty full rich poor huge tiny giant broken golden silver wooden strange odd plain modern ancient
noble humble bold timid eager gloomy merry clumsy elegant secret royal lonely
""")
VERBS = listed("""
fix build buy sell cook bake wash clean paint draw grow cut find make open close start stop move
sort solve design plan book order check improve repair install cancel send print download delete
translate review edit finish explain compare measure test pack carry wear choose train feed catch
""")
PLACES = listed("""
shop museum library office pool market pharmacy gym bank school theatre zoo clinic hotel station
kitchen garage gallery salon bar
""")
PHRASES = (
    "the quick brown fox jumps over the lazy dog",
    "all roads lead to the sea",
    "a page is never lost",
    "good morning sunshine",
    "practice makes perfect",
    "better late than never",
    "the early bird catches the worm",
    "every cloud has a silver lining",
    "rain in spring brings flowers",
    "we meet again at noon",
    "the train leaves at ten",
    "silence is golden",
    "home sweet home",
    "one step at a time",
)
NUMBER_WORDS = listed("""
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen twenty
""")
