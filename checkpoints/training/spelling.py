# ruff: noqa: E501, SIM905 - lists of words
"""Text in images: the alphabet, ordinary words, and the split that holds some out for the judge."""

from __future__ import annotations

import functools
import hashlib
import random

LATIN = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
HAN = (
    "福家春夏秋冬日月年生快乐你好谢加油新品限定大小人山水火木金土天地中国上下左右店茶酒花书开心吉祥喜爱美食出口入门"
    "电话热卖特价免费"
)
GLYPHS = LATIN + HAN
# A glyph's cell in pixels; a multiple of 16 aligns all glyphs of a row with the token grid.
CELL_HEIGHT, LATIN_WIDTH, HAN_WIDTH = 48, 32, 48
MOST_LETTERS, MOST_HAN = 7, 4
REAL_SHARE = 0.5  # the rest are random spellings: they teach the letters, not the words
HELD_OUT_ONE_IN = 10

_HAN_WORDS = """
福 家 春 夏 秋 冬 喜 爱 茶 酒 花 书 店 山 水 火 你好 谢谢 加油 新年 快乐 生日 生日快乐 新年快乐 新春快乐 春日 春天 夏日 夏天
秋日 秋天 冬日 冬天 春日限定 夏日限定 秋日限定 冬日限定 新品 限定 特价 免费 热卖 出口 入口 电话 开门 门口 大门 上下 左右 大小
山水 火山 金山 天地 中国 国家 人家 大家 家人 美食 食品 茶花 花茶 酒店 书店 花店 茶店 食品店 开心 爱心 小心 心爱 吉祥 大吉 喜爱
好人 好茶 好酒 好书 好花 天天 天天开心 天天快乐 月月 年年 美好 美人 美酒 小店 小家 小人 大人 大火 大山 水火 木门 土地 天下 地上
地下 水上 山上 山下 上山 下山 上门 出门 入门 下水 水花 火花 花生 生火 热茶 热水 热食 热爱 热心 新家 新店 新书 新春 新人 新生 新茶
吉日 日出 日月 月下 家电 水电 话费 电话费 出国 国人 中国人 中国茶 国花 国土 中心 中年 开口 开花 开店 开水 开年 上天 特好 特大
特价品 免费茶 新品特价 新品热卖 热卖中 特卖 卖花 卖茶 谢谢你 谢谢大家 爱你 爱家 爱中国 喜乐 大家好 福地 福人 福年 福门 加热 加大
油门 小山 小花 小书 小门 大国 大年 大地 大酒店 小茶店 小书店 心花 火热 金花 金门 金木 土木 木火 天火 天花 天山 春花 秋月 夏花 冬火
春茶 秋茶 新春大吉 大吉祥 吉祥年 美食店 美食山 限定品 年限 日限 定价 特定 好年 好日 好心 好家 生人 生水 生食 口水 人口 出入
出入口 上口 电门 食油 茶油 金油 定金 年金 酒水 酒花 书生 书山 花山 花木 花火 花心 花月 月山 月花 祥福 爱花 爱书 爱人 快卖 快开
""".split()
_LATIN_WORDS = """
HELLO LOVE OK WOW HAPPY YES NO SALE OPEN CLOSED EXIT ENTER STOP GO START END WELCOME THANKS PLEASE SORRY BYE HI HEY JOY FUN
FREE NEW HOT COLD BIG SMALL BEST GOOD NICE COOL SWEET LUCKY MAGIC DREAM HOPE PEACE SMILE LAUGH PARTY DANCE MUSIC SONG PLAY GAME
WIN WINNER HERO STAR MOON SUN SKY SEA RAIN SNOW WIND FIRE WATER EARTH TREE FLOWER GARDEN FOREST RIVER LAKE BEACH ISLAND
SPRING SUMMER AUTUMN WINTER MONDAY FRIDAY SUNDAY JUNE JULY MARCH APRIL MAY TODAY NOW SOON LATER NEVER ALWAYS HOME HOUSE ROOM
DOOR WINDOW SHOP STORE MARKET BANK HOTEL MUSEUM SCHOOL OFFICE STUDIO PARK ZOO FARM CAFE COFFEE TEA MILK JUICE BEER WINE BREAD
CAKE COOKIE PIZZA BURGER SUSHI NOODLE SOUP SALAD FRUIT APPLE LEMON ORANGE PEACH BERRY MANGO CHERRY HONEY SUGAR SALT PEPPER
CAT DOG BIRD FISH LION TIGER BEAR PANDA FOX WOLF HORSE RABBIT MOUSE WHALE SHARK BABY BOY GIRL MAN WOMAN MOM DAD KING QUEEN
FRIEND FAMILY TEAM CLUB CITY TOWN WORLD CHINA PARIS LONDON TOKYO ROME BERLIN ROAD STREET BRIDGE TRAIN BUS TAXI CAR BIKE PLANE
SHIP BOAT ROCKET ROBOT PHONE RADIO VIDEO MOVIE PHOTO BOOK PAPER PEN NOTE LETTER MAIL NEWS CLOCK WATCH TIME MONEY PRICE GIFT
CARD BOX BAG HAT SHOE SHIRT DRESS RING GOLD SILVER RED BLUE GREEN BLACK WHITE PINK PURPLE BROWN GREY YELLOW ONE TWO THREE FOUR
FIVE SIX SEVEN EIGHT NINE TEN ZERO FIRST LAST LEFT RIGHT UP DOWN PUSH PULL WAIT LOOK READ WRITE DRAW PAINT COOK EAT DRINK
SLEEP WAKE WALK RUN JUMP SWIM FLY QUIET SAFE DANGER CAUTION HELP INFO VIP WIFI TOILET LIFT MENU ENJOY RELAX YOGA GYM SPORT
TENNIS SOCCER GOLF RACE JAZZ ROCK BLUES OPERA QUIZ ZEBRA JACKET KIWI QUICK EXTRA LUXURY BOUNTY VIVID WIZARD PUZZLE JUNGLE
""".split()


def script(text: str) -> str:
    """Return ``han`` or ``latin``."""
    return "latin" if text[0] in LATIN else "han"


def cell_width(text: str) -> int:
    return LATIN_WIDTH if script(text) == "latin" else HAN_WIDTH


@functools.cache
def is_held_out(text: str) -> bool:
    """Tell by a stable hash whether a word is held out for the judge."""
    return hashlib.sha256(f"word|{text}".encode()).digest()[0] % HELD_OUT_ONE_IN == 0


@functools.cache
def real_words(held_out: bool, kind: str, room: int) -> tuple[str, ...]:
    """Return the ordinary words of a script and a side of the split that fit into ``room`` pixels."""
    words = _LATIN_WORDS if kind == "latin" else _HAN_WORDS
    fitting = [w for w in words if len(w) * cell_width(w) <= room]
    return tuple(w for w in dict.fromkeys(fitting) if is_held_out(w) == held_out)


def draw_text(rng: random.Random, room: int, held_out: bool = False) -> str:
    """Draw a text: with ``held_out`` a held-out word, otherwise any other text."""
    kind = rng.choice(["latin", "han"])
    if held_out:
        return rng.choice(real_words(True, kind, room))
    if rng.random() < REAL_SHARE:
        return rng.choice(real_words(False, kind, room))
    letters, most, width = (LATIN, MOST_LETTERS, LATIN_WIDTH) if kind == "latin" else (HAN, MOST_HAN, HAN_WIDTH)
    while True:
        text = "".join(rng.choices(letters, k=rng.randint(1, min(most, room // width))))
        if not is_held_out(text):
            return text


def glyph_numbers(text: str) -> list[int]:
    """Return the indices of the characters in ``GLYPHS``, padded with −1 to the longest row."""
    numbers = [GLYPHS.index(c) for c in text]
    return numbers + [-1] * (MOST_LETTERS - len(numbers))
