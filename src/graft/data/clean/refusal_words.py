"""How assistants refuse and disclaim, language by language. Data for `refusal`: regular expressions, no logic.

`REFUSALS` are looked for at the beginning of an answer, `DISCLAIMERS` at the beginning of any sentence. Each says that
the speaker is the one who cannot: "I cannot help with that", not "the patient cannot".
"""

from __future__ import annotations

_AI_EN = (
    r"(?:ai|artificial intelligence|(?:large )?language model|llm|chat ?bot|virtual assistant|digital assistant|"
    r"machine learning model|computer program|text-based (?:ai|model|assistant))"
)
_AI_ZH = (
    r"(?:人工智[能慧]|ai|大?型?[语語]言模型|大模型|机器人|機器人|虚拟助[手理]|虛擬助[手理]|智能助[手理]|"
    r"[语語]言助[手理]|聊天助[手理]|计算机程序|電腦程式)"
)
_KIND_EN = r"(?: (?:assistant|(?:language )?model|system|program|chat ?bot|bot|tool|agent|and|like|that|who|by)\b[^,.!?\n]{0,40})?"
"""What may follow: "an AI assistant", "a language model trained by X", not "an AI engineer"."""
_HELP_EN = (
    r"(?:assist|help|provide|fulfil?l?|comply|answer|generate|create|write|engage|discuss|support|share|participate|"
    r"complete|do (?:that|this)|offer|access|browse|open|view|process|give|promote|condone|respond|continue|perform|"
    r"recommend|suggest|predict|make|produce|tell|say|advise|endorse|encourage|facilitate|carry out|display|see|recall|"
    r"remember|speak|play|watch|listen)"
)
_HELP_ZH = (
    r"(?:提供|回答|[帮幫]助|[协協]助|[满滿]足|生成|完成|[执執]行|[参參][与與]|[讨討][论論]|[给給]出|透露|[访訪][问問]|"
    r"[浏瀏][览覽]|打[开開]|查看|[处處]理|支持|[继繼][续續]|[编編][写寫]|[创創]作|[预預][测測]|[评評][论論]|[显顯]示|[帮幫]|做到)"
)

REFUSALS: dict[str, str] = {
    "en": (
        r"(?:(?:i'm|i am|we're|so|very|truly|really|my|oh no|oops|ah)[ ,]+){0,3}"
        r"(?:(?:sorry|apologies|apologi[sz]e|i apologi[sz]e|unfortunately|regrettably|i regret)[^.!?\n]{0,60}?[,.;:!—-]?\s*)?"
        r"(?:(?:but|however|that)[, ]+)?"
        rf"(?:as an? (?:\w+[ -]){{0,3}}{_AI_EN}[^,.\n]{{0,40}},\s*)?"
        r"i (?:just |simply |currently |really )?"
        r"(?:can't|cannot|can not|won't|will not|am unable to|am not able to|do not have the ability to|"
        r"don't have the ability to|am not programmed to|am not capable of|am not allowed to|am not permitted to|must decline to|"
        r"have to decline to)"
        rf" (?:\w+ly )?(?:be able to )?{_HELP_EN}"
    ),
    "zh": (
        r"(?:(?:非常|很|十分|真的|真是|实在|實在)?(?:抱歉|对不起|對不起|不好意思|[遗遺]憾)[^。!?\n]{0,20}?[,，。!！:：]?\s*)"
        rf"(?:但是?[,，]?)?(?:作[为為][^。\n]{{0,20}}[,，]\s*)?(?:由于|由於|因[为為])?[^。\n]{{0,20}}?我[^。,，\n]{{0,12}}?"
        rf"(?:[无無]法|不能|[没沒]有?[办辦]法|不[会會]|不可以|不便|[没沒]有能力|[没沒]有[权權]限)[^。,，\n]{{0,12}}?{_HELP_ZH}"
        rf"|我(?:[无無]法|不能)(?:[为為][您你])?{_HELP_ZH}(?:[这這][个個類类]|[该該]|此|[您你]|任何|相[关關]|有[关關])"
    ),
    "es": (
        r"(?:lo siento|lo lamento|disculpa|perdón|perdona|me temo|lamentablemente|desafortunadamente)[^.!?\n]{0,60}?"
        r"(?:no puedo|no soy capaz de|no me es posible|no estoy (?:programado|diseñado))\b"
    ),
    "fr": (
        r"(?:(?:je suis |je |vraiment )*(?:désolée?|navrée?|m'excuse|regrette)|malheureusement|pardon)[^.!?\n]{0,60}?"
        r"je ne (?:peux|puis|suis pas (?:en mesure|capable|autorisée?)|saurais)\b"
    ),
    "de": (
        r"(?:es tut mir (?:sehr )?leid|tut mir leid|entschuldigung|leider|ich bedaure)[^.!?\n]{0,60}?"
        r"(?:kann ich|ich kann|ich bin nicht in der lage|darf ich|ich darf)[^.!?\n]{0,80}?"
        r"(?:nicht|kein\w*)[^.!?\n]{0,60}?(?:helfen|beantworten|bereitstellen|unterstützen|geben|erstellen|machen|anbieten|erfüllen)"
    ),
    "it": (
        r"(?:mi dispiace|mi spiace|purtroppo|scusa|mi scuso)[^.!?\n]{0,60}?"
        r"(?:non posso|non sono in grado|non mi è possibile|non ho la capacità)\b"
    ),
    "pt": (
        r"(?:desculpe|desculpa|sinto muito|lamento|infelizmente|me desculpe|peço desculpas?)[^.!?\n]{0,60}?"
        r"(?:não posso|não consigo|não sou capaz|não é possível|não estou (?:programado|autorizado))\b"
    ),
    "nl": (
        r"(?:het spijt me|sorry|helaas|excuses)[^.!?\n]{0,60}?(?:kan ik|ik kan|ik ben niet in staat|mag ik)[^.!?\n]{0,80}?"
        r"(?:niet|geen)[^.!?\n]{0,60}?(?:helpen|beantwoorden|geven|verstrekken|bieden|maken|voldoen)"
    ),
    "ru": (
        r"(?:извините|простите|к сожалению|прошу прощения|мне жаль|сожалею)[^.!?\n]{0,60}?"
        r"я (?:не могу|не способ(?:ен|на)|не в состоянии|не имею возможности|не буду)\b"
    ),
    "pl": r"(?:przepraszam|przykro mi|niestety)[^.!?\n]{0,60}?nie (?:mogę|jestem w stanie|potrafię)\b",
    "tr": r"(?:üzgünüm|özür dilerim|maalesef)[^.!?\n]{0,100}?(?:yardımcı olamam|yapamam|veremem|sağlayamam|yanıtlayamam)",
    "ja": (
        r"(?:大変|誠に|まことに)?(?:申し訳(?:ありません|ございません|ない)|すみません|ごめんなさい|残念ながら|恐れ入りますが)"
        r"[^。\n]{0,60}?(?:できません|できかねます|いたしかねます|お答えできません|お手伝いできません|対応できません)"
    ),
    "ko": (
        r"(?:죄송합니다|죄송하지만|미안합니다|미안하지만|유감스럽게도|아쉽게도)[^.\n]{0,20}?[.,]?[^.\n]{0,60}?"
        r"(?:수 없습니다|수 없어요|드릴 수 없|도와드릴 수 없|못합니다|불가능합니다)"
    ),
    "ar": r"(?:عذر[اًا]+|آسف|أعتذر|للأسف|المعذرة)[^.!؟\n]{0,60}?(?:لا أستطيع|لا يمكنني|لست قادر|لا أملك القدرة|غير قادر)",
    "vi": r"(?:xin lỗi|rất tiếc|tôi xin lỗi|tôi rất tiếc)[^.!?\n]{0,60}?(?:tôi )?(?:không thể|không có khả năng)\b",
    "hi": r"(?:क्षमा करें|माफ़? कीजिए|मुझे खेद है|माफ करें)[^।\n]{0,80}?(?:नहीं कर सकता|नहीं कर सकती|असमर्थ हूँ|नहीं दे सकता)",
}

DISCLAIMERS: dict[str, str] = {
    "en": (
        rf"(?:i'm sorry,? but |unfortunately,? |however,? |but )?as an? (?:\w+[ -]){{0,3}}{_AI_EN}\b{_KIND_EN}"
        r"(?:, (?:developed|created|trained|made) by [^,\n]{1,40})?,?\s+i\b[^.!?\n]{0,50}"
        r"\b(?:do not|don't|cannot|can not|can't|am not|am unable|have no|lack|am only|am just|did not|didn't|was not|wasn't|"
        r"haven't|have not|will not|won't|never|am incapable|am neither)\b"
        rf"|i am (?:just|only|merely|simply) an? (?:\w+[ -]){{0,3}}{_AI_EN}\b"
        rf"|i am an? (?:\w+[ -]){{0,3}}{_AI_EN}\b[^.!?\n]{{0,60}}\b(?:do not|don't|cannot|can't|have no|lack|am not|unable)\b"
        r"|my (?:knowledge|training)(?: data)?(?: cut-?off| only goes| is limited| ends)[^.!?\n]{0,40}\b20[12]\d\b"
    ),
    "zh": (
        rf"(?:很?抱歉[,，])?(?:[请請]注意[,，:：])?(?:但是?[,，]?)?(?:我)?作[为為](?:一[个個名款种種位])?[^。,，\n]{{0,12}}?{_AI_ZH}[^。,，\n]{{0,12}}[,，]?\s*"
        r"我[^。!?,，\n]{0,16}(?:[没沒]有|[无無]法|不能|不[会會]|不具[备備有]|[并並]不|不是|只能|[无無][权權]|[没沒][办辦]法)"
        rf"|我(?:只|[仅僅])+是(?:一[个個名款种種位])?[^。,，\n]{{0,6}}?{_AI_ZH}"
        rf"|我是(?:一[个個名款种種位])?[^。,，\n]{{0,6}}?{_AI_ZH}[^。,，\n]{{0,6}}[,，][^。\n]{{0,12}}(?:[没沒]有|[无無]法|不能|不具[备備有])"
    ),
    "es": (
        r"como (?:un |una )?(?:modelo de (?:lenguaje|ia|inteligencia artificial)|ia|inteligencia artificial|asistente virtual)\b"
        r"[^.!?\n]{0,60}\bno (?:tengo|puedo|soy|poseo|estoy)\b"
    ),
    "fr": (
        r"en tant qu(?:e |')(?:un |une )?(?:modèle (?:de langage|d'ia|linguistique)|ia|intelligence artificielle|assistant)\b"
        r"[^.!?\n]{0,60}\bje (?:ne|n')"
    ),
    "de": (
        r"als (?:ein(?:e|em)? )?(?:ki\b|künstliche intelligenz|(?:großes |ki-)?sprachmodell|ki-\w+|virtueller assistent)"
        r"[^.!?\n]{0,40}\b(?:habe|kann|bin|verfüge|besitze) ich\b[^.!?\n]{0,40}\b(?:nicht|kein\w*)\b"
    ),
    "it": (
        r"(?:come|in quanto) (?:un |una |un')?(?:modello (?:di linguaggio|linguistico)|ia|ai|intelligenza artificiale|"
        r"assistente virtuale)\b[^.!?\n]{0,60}\bnon (?:ho|posso|sono|possiedo)\b"
    ),
    "pt": (
        r"como (?:um |uma )?(?:modelo de (?:linguagem|ia)|ia|inteligência artificial|assistente virtual)\b"
        r"[^.!?\n]{0,60}\bnão (?:tenho|posso|sou|possuo|consigo)\b"
    ),
    "nl": (
        r"als (?:een )?(?:ai|kunstmatige intelligentie|(?:ai-)?taalmodel|virtuele assistent)\b[^.!?\n]{0,40}"
        r"\b(?:heb|kan|ben|beschik) ik\b[^.!?\n]{0,40}\b(?:niet|geen)\b"
    ),
    "ru": (
        r"(?:как|будучи|являясь) (?:языков\w+ модел\w+|искусственн\w+ интеллект\w*|ии\b|виртуальн\w+ ассистент\w*)"
        r"[^.!?\n]{0,40}\bя не\b|я (?:всего лишь|только|просто) (?:языковая модель|искусственный интеллект|ии\b|программа)"
    ),
    "ja": (
        r"(?:私は)?(?:ai|人工知能|(?:大規模)?言語モデル|aiアシスタント)(?:言語モデル|アシスタント)?(?:として|なので|であるため|ですので)"
        r"[^。\n]{0,60}(?:できません|ありません|持っていません|持ちません|持ち合わせていません)"
    ),
    "ko": (
        r"(?:저는 )?(?:ai|인공지능|(?:대규모 )?언어 ?모델)[^.\n]{0,20}(?:으로서|로서|이기 때문에|이므로|이라서)"
        r"[^.\n]{0,60}(?:없습니다|않습니다|못합니다)"
    ),
}
