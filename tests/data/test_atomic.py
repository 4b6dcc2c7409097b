"""Reading atomic files: what is data, what is an error, and where the error is."""

import html
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_llm.data import atomic
from recbole_llm.data.atomic import clean_text, is_missing_id, read_header, read_item_attributes, read_table
from recbole_llm.errors import UserError

ITEM = "item_id:token\ttitle:token_seq\tbrand:token_seq\tprice:float\n"


@pytest.fixture
def write(tmp_path):
    def write(content, name="shop.item"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_read_table_types_columns_and_line_numbers(write):
    path = write("user_id:token\trating:float\tnote:token_seq\nu1\t4.5\ta b\n\nu2\t\t\n")
    table = read_table(path)
    assert table.types == {"user_id": "token", "rating": "float", "note": "token_seq"}
    assert table.columns["user_id"] == ["u1", "u2"]
    np.testing.assert_array_equal(table.columns["rating"], [4.5, np.nan])
    assert table.columns["note"] == ["a b", ""]
    assert list(table.lines) == [2, 4]  # the blank line 3 is no record
    assert list(read_table(path, ["rating"]).columns) == ["rating"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False], ids=["ended", "open"])
def test_line_ends_and_byte_order_mark_are_no_data(write, end, last):
    text = "\ufeff" + end.join(["item_id:token\ttitle:token_seq", "1\tA", "2\tB"]) + (end if last else "")
    table = read_table(write(text))
    assert table.columns == {"item_id": ["1", "2"], "title": ["A", "B"]}


def test_only_newlines_end_a_record_and_quotes_are_text(write):
    titles = ['24" TV', '"quoted"', 'a"b\x0bc', "d\x85e\u2028f", "tab-less\x1cg", "nul\x00h"]
    content = "item_id:token\ttitle:token_seq\n" + "".join(f"{i}\t{t}\n" for i, t in enumerate(titles))
    assert read_table(write(content)).columns["title"] == titles


def test_lines_are_counted_across_chunks(write, monkeypatch):
    monkeypatch.setattr("recbole_llm.data.atomic._CHUNK_CHARACTERS", 40)
    content = "item_id:token\tprice:float\n" + "".join(f"item{i}\t{i}\n" for i in range(50))
    table = read_table(write(content))
    assert table.columns["item_id"] == [f"item{i}" for i in range(50)]
    np.testing.assert_array_equal(table.columns["price"], np.arange(50))
    assert list(table.lines) == list(range(2, 52))
    with pytest.raises(UserError, match=r"shop\.item:47 has 'x' as price"):
        read_table(write(content.replace("item45\t45", "item45\tx")))
    with pytest.raises(UserError, match=r"shop\.item:30 has 1 columns"):
        read_table(write(content.replace("item28\t", "item28")))


def test_other_separators_and_encodings(write):
    path = write("item_id:token::title:token_seq\n1::Caf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match="column 1 of its header"):
        read_table(path, separator="\t", encoding="latin-1")
    # "name:type" holds a colon itself: such a separator cannot work, and is not silently half understood
    with pytest.raises(UserError, match="'item_id:token::title:token_seq'"):
        read_header(path, encoding="latin-1")
    path = write("item_id:token||title:token_seq\n1||Caf\xe9\n".encode("latin-1"))
    assert read_table(path, separator="||", encoding="latin-1").columns["title"] == ["Caf\xe9"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "shop.item is empty"),
        ("item_id\ttitle:token_seq\n", "shop.item:1 has 'item_id' as column 1 of its header: write name:type"),
        ("item_id:token\ttitle:text\n", "shop.item:1 has 'title:text' as column 2 of its header"),
        ("item_id:token\t:token\n", "shop.item:1 has ':token' as column 2"),
        ("item_id:token\titem_id:token\n", "shop.item:1 names the field 'item_id' twice"),
        (ITEM + "1\tA\tX\t1\n2\tB\n", "shop.item:3 has 2 columns where the header names 4: put one tab between"),
        (ITEM + "1\tA\tX\t1\t\n", "shop.item:2 has 5 columns where the header names 4"),
        (ITEM + "\n1\tA\tX\t1\n\n2\tB\n", "shop.item:5 has 2 columns"),
        (ITEM + "1\tA\tX\t9,99\n", "shop.item:2 has '9,99' as price, which is no number"),
        (ITEM + "1\tA\tX\t\n2\tA\tX\t2020_01_01\n", "shop.item:3 has '2020_01_01' as price"),
        (ITEM.encode() + b"1\tA\tX\t1\n2\tCaf\xe9\tY\t1\n", r"shop.item:3 holds bytes that are not utf-8 (b'\xe9'): save"),
        (b"item_id:token\ttitl\xe9:token_seq\n", "shop.item:1 holds bytes that are not utf-8"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_in_one_line(write, content, message):
    path = write(content)
    with pytest.raises(UserError) as error:
        read_table(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_encoding(write):
    with pytest.raises(UserError, match="key encoding names 'utf-9'"):
        read_table(write(ITEM), encoding="utf-9")


def test_numbers_are_read_exactly(write):
    values = [1405296000, 1405296000.123, 0.1, -3.0, 1e300, 1234567890123.5]
    table = read_table(write("t:float\n" + "".join(f"{v!r}\n" for v in values)))
    assert table.columns["t"].tolist() == values


def test_item_attributes_of_one_and_of_several_fields(write):
    path = write(ITEM + "b\tRed & white shoes\tAcme\t9\na\t\tAcme\t2.5\nc\tHat\t \t\nd\t\t\t\n")
    assert read_item_attributes(path, "item_id", ["title"]) == {
        "b": ("Red & white shoes",),
        "a": (),
        "c": ("Hat",),
        "d": (),
    }
    assert read_item_attributes(path, "item_id", ["brand", "title", "price"]) == {
        "b": ("Acme", "Red & white shoes", "9"),
        "a": ("Acme", "2.5"),
        "c": ("Hat",),
        "d": (),
    }


@pytest.mark.parametrize(
    "fields, content, message",
    [
        (["name"], ITEM, "has no field 'name' to take the items' text from, only title, brand, price: set the key item_text"),
        (["title"], "asin:token\ttitle:token_seq\n", "has no field 'item_id', only asin, title: add a column item_id:token"),
        (["title"], "item_id:float\ttitle:token_seq\n", ":1 declares item_id as 'float': write item_id:token"),
        (["title"], ITEM + "1\tA\t\t\n\n2\tB\t\t\n1\tC\t\t\n2\tD\t\t\n", ":5 describes item '1' again, after line 2: keep one"),
        (["title"], ITEM + "1\tA\t\t\n\tB\t\t\n", ":3 has no item_id (it reads '')"),
        (["title"], ITEM + "1\tA\t\t\nNaN\tB\t\t\n", ":3 has no item_id (it reads 'NaN')"),
    ],
)
def test_item_files_that_cannot_be_used(write, fields, content, message):
    path = write(content)
    with pytest.raises(UserError) as error:
        read_item_attributes(path, "item_id", fields)
    assert str(error.value).startswith(str(path)) and message in str(error.value)


def test_missing_ids():
    assert all(map(is_missing_id, ["", "  ", "nan", "NaN"]))
    assert not any(map(is_missing_id, ["NA", "null", "None", "0", "nano"]))


@pytest.mark.parametrize(
    "raw, text",
    [
        ("24&quot; TV &amp; arm", '24" TV & arm'),
        ("10.1&amp;quot; Toshiba", '10.1" Toshiba'),  # doubly escaped, as Amazon prints it
        ("Fr&amp;amp;eacute;d&eacute;ric", "Frédéric"),
        ("RUBAN&amp;#8482 3 in 1", "RUBAN™ 3 in 1"),
        ("&#39;&#x2605;&#153;", "'★™"),
        ("R&B; soul, AT&T, Salt&notes &copy 2001", "R&B; soul, AT&T, Salt&notes &copy 2001"),
        ("Mom &#1 fan", "Mom &#1 fan"),
        ("a&#10;b", "a b"),
        ("one\x00\x07two\x0bthree\u2028four\x85five", "one two three four five"),
        ("  outer  and inner  ", "outer  and inner"),
        ("<|im_end|>[UserOut]</s> {title} \\n %s", "<|im_end|>[UserOut]</s> {title} \\n %s"),
        ("“curly” ☃ 日本語 \u200d", "“curly” ☃ 日本語 \u200d"),
        (" \t\x00 ", ""),
    ],
)
def test_clean_text(raw, text):
    assert clean_text(raw) == text


def test_clean_text_keeps_length():
    assert clean_text("x" * 10_000) == "x" * 10_000
    assert len(clean_text("&amp;" * 10_000)) == 10_000


@given(st.text(alphabet=st.sampled_from("ab &;#x12amplquot\x00\n\u2028é"), max_size=40))
def test_clean_text_is_idempotent_and_one_line(raw):
    text = clean_text(raw)
    assert clean_text(text) == text
    assert len(text.splitlines()) <= 1


@given(st.text(max_size=40))
def test_what_was_escaped_comes_back(raw):
    assert clean_text(html.escape(raw)) == clean_text(raw)


def cleaned_by_repeated_passes(text):
    """What the cleaning means, each pass over the whole text: quadratic."""
    while "&" in text:
        resolved = atomic._REFERENCE.sub(atomic._resolve, text)
        if resolved == text:
            break
        text = resolved
    return atomic.CONTROLS.sub(" ", text).strip()


PIECES = "& amp; #38; #x26; &#3 8; &am &#112; ; &quot; &#39 &#59; # x 1 12345678 &lt &#0; &nGg; a é ² &#9; &#1114112;".split()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_clean_text_is_what_repeated_passes_give(raw):
    assert clean_text(raw) == cleaned_by_repeated_passes(raw)
    assert atomic.CONTROLS.sub(" ", atomic._resolve_all(raw)).strip() == clean_text(raw)


@pytest.mark.parametrize(
    "raw", ["&amp;" * 80_000, "&" + "amp;" * 100_000, "&#38;" + "#38;" * 100_000, "&" * 400_000, "&" + "a" * 400_000],
    ids=["run", "nested", "nested numbers", "bare", "name"],
)  # fmt: skip
def test_cleaning_takes_time_in_proportion_to_the_length(raw):
    started = time.process_time()
    clean_text(raw)
    assert time.process_time() - started < 1
