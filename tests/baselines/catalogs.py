"""The same ten titles in several languages; items 2n and 2n + 1 are of one kind, and each other's nearest."""

# Letters of other scripts that look like Latin ones are meant.
# ruff: noqa: RUF001

CATALOGS = {
    "English": [
        *("green tea leaves", "Organic GREEN TEA", "coffee beans", "ground Coffee", "red running shoes"),
        *("Blue Running Shoes", "leather wallet", "small leather bag", "story book for children", "new Story Book"),
    ],
    "Hindi": [
        *("हरी चाय की पत्ती", "जैविक हरी चाय", "कॉफी के दाने", "पिसी हुई कॉफी", "लाल दौड़ने के जूते"),
        *("नीले दौड़ने के जूते", "चमड़े का बटुआ", "छोटा चमड़े का थैला", "बच्चों की कहानी की किताब", "कहानी की नई किताब"),
    ],
    "Chinese": [
        *("绿茶茶叶", "有机绿茶包", "咖啡豆", "研磨咖啡粉", "红色跑步鞋"),
        *("蓝色跑步鞋", "真皮钱包", "小号真皮手袋", "儿童故事书", "新版故事书"),
    ],
    "Japanese": [
        *("緑茶の茶葉", "有機緑茶ティーバッグ", "コーヒー豆", "挽いたコーヒー", "赤いランニングシューズ"),
        *("青いﾗﾝﾆﾝｸﾞｼｭｰｽﾞ", "革の財布", "小さな革のバッグ", "子供の絵本", "新しい絵本"),
    ],
    "Korean": [
        *("녹차 잎", "유기농녹차 티백", "커피원두", "분쇄 커피", "빨간 운동화"),
        *("파란운동화", "가죽 지갑", "작은가죽가방", "어린이 동화책", "새로운 동화책"),
    ],
    "Thai": [
        *("ใบชาเขียว", "ชาเขียวออร์แกนิก", "เมล็ดกาแฟ", "กาแฟบด", "รองเท้าวิ่งสีแดง"),
        *("รองเท้าวิ่งสีน้ำเงิน", "กระเป๋าสตางค์หนัง", "กระเป๋าหนังใบเล็ก", "หนังสือนิทานเด็ก", "นิทานเล่มใหม่"),
    ],
    "Arabic": [
        *("شَاي أَخْضَر", "شاي اخضر عضوي", "حبوب قهوة", "قَهْوَة مطحونة", "حذاء رياضي أحمر"),
        *("حِذَاء رِيَاضِي ازرق", "محفظة جلد", "حقيبة جِلْد صغيرة", "كتاب قصص أطفال", "كِتَاب قِصَص جديد"),
    ],
    "Turkish": [
        *("YEŞİL ÇAY yaprağı", "organik yeşil çay", "kahve çekirdeği", "ÇEKİLMİŞ KAHVE", "kırmızı koşu ayakkabısı"),
        *("MAVİ KOŞU AYAKKABISI", "deri cüzdan", "KÜÇÜK DERİ ÇANTA", "çocuk HİKÂYE kitabı", "yeni hikâye KİTABI"),
    ],
    "German": [
        *("GRÜNER TEE lose", "grüner Tee Bio", "süße Kaffeebohnen", "SÜSSE BOHNEN", "rote Laufschuhe Größe 42"),
        *("BLAUE SCHUHE GRÖSSE 43", "weiße Geldbörse", "WEISSE TASCHE", "Märchenbuch für Kinder", "neues MÄRCHENBUCH"),
    ],
    "French": [
        *("thé vert en feuilles", "THÉ VERT bio", "café en grains", "CAFÉ moulu", "chaussures légères rouges"),
        *("Chaussures LÉGÈRES bleues", "étui cuir", "petit ÉTUI", "conte de fées", "FÉES : nouveau conte"),
    ],
    "Greek": [
        *("πράσινο τσάι φύλλα", "ΠΡΑΣΙΝΟ ΤΣΑΙ", "κόκκοι καφέ", "ΑΛΕΣΜΕΝΟΣ ΚΑΦΕ", "κόκκινα αθλητικά παπούτσια"),
        *("ΜΠΛΕ ΑΘΛΗΤΙΚΑ ΠΑΠΟΥΤΣΙΑ", "δερμάτινο πορτοφόλι", "ΜΙΚΡΟ ΔΕΡΜΑΤΙΝΟ", "παιδικό παραμύθι", "ΝΕΟ ΠΑΡΑΜΥΘΙ"),
    ],
}
