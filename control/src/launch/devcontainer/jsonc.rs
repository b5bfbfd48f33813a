//! JSON with comments and trailing commas, and no other extension of JSON. Pure.

use jsonc_parser::tokens::Token;
use jsonc_parser::{ParseOptions, Scanner, ScannerOptions, parse_to_serde_value};
use serde_json::Value;

/// The dialect. All fields are listed, so that a field which a new version of the crate adds is a compile error here.
const DIALECT: ParseOptions = ParseOptions {
    allow_comments: true,
    allow_trailing_commas: true,
    allow_loose_object_property_names: false,
    allow_missing_commas: false,
    allow_single_quoted_strings: false,
    allow_hexadecimal_numbers: false,
    allow_unary_plus_numbers: false,
    allow_bare_decimal_point_numbers: false,
    allow_non_finite_numbers: false,
    allow_extended_string_escapes: false,
};

/// Parses a text. Untrusted text cannot exhaust the stack: the parser accepts at most 512 levels of nesting.
///
/// The error names the problem with its line and column.
pub(super) fn read(text: &str) -> Result<Value, String> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    refuse_loose_characters(text)?;
    parse_to_serde_value(text, &DIALECT).map_err(|error| {
        let mut what = error.kind().to_string();
        // The message continues a sentence of the caller.
        if let Some(first) = what.get_mut(..1) {
            first.make_ascii_lowercase();
        }
        format!("{what} at line {} column {}", error.line_display(), error.column_display())
    })
}

/// Refuses what the parser accepts and JSON does not allow, for which the parser has no option: control characters in
/// strings, and white space other than that of JSON (RFC 8259, sections 7 and 2). This also reports a missing quote at
/// its own line, and not at the next string.
fn refuse_loose_characters(text: &str) -> Result<(), String> {
    let mut scanner = Scanner::new(text, &ScannerOptions::default());
    let mut end = 0;
    loop {
        // The parser reports the error of an invalid token.
        let Ok(token) = scanner.scan() else { return Ok(()) };
        let start = scanner.token_start();
        let is_strange = |c: char| !matches!(c, ' ' | '\t' | '\n' | '\r');
        refuse(text, end, start, "white space that JSON does not allow", is_strange)?;
        end = scanner.token_end();
        match token {
            Some(Token::String(_)) => {
                let what = "a line end or another control character in a string";
                refuse(text, start, end, what, |c| c < ' ')?;
            }
            Some(_) => {}
            None => return Ok(()),
        }
    }
}

/// Refuses the characters for which `kind` holds, between two byte offsets of the text.
fn refuse(text: &str, from: usize, to: usize, what: &str, kind: impl Fn(char) -> bool) -> Result<(), String> {
    let Some(at) = text.get(from..to).and_then(|part| part.find(kind)) else { return Ok(()) };
    let before = text.get(..from + at).unwrap_or(text);
    let line = before.rsplit('\n').next().unwrap_or(before);
    let lines = before.len() - before.replace('\n', "").len();
    Err(format!("{what} at line {} column {}", lines + 1, line.chars().count() + 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn comments_and_trailing_commas_are_ignored() {
        let text =
            "\u{feff}// größe\r\n{ /* a, } */ \"a\": [1, 2, /* x */ ], // }\n \"b\": {\"c\": 1, }, }/**/";
        assert_eq!(read(text), Ok(json!({"a": [1, 2], "b": {"c": 1}})));
    }

    #[test]
    fn text_in_strings_is_unchanged() {
        for text in [r#""// no""#, r#""/* no */,]""#, r#""\"// no""#, r#""\\""#, r#""\u0041\ud83d\ude00\t""#]
        {
            assert_eq!(read(text), Ok(serde_json::from_str(text).unwrap()), "{text}");
        }
    }

    #[test]
    fn the_last_of_two_fields_with_one_name_is_used() {
        assert_eq!(read(r#"{"a": 1, "a": 2}"#), Ok(json!({"a": 2})));
    }

    #[test]
    fn other_extensions_of_json_are_refused() {
        for text in [
            "{'a': 1}",
            "{a: 1}",
            "{1: 1}",
            "[0x1]",
            "[+1]",
            "[.5]",
            "[5.]",
            "[01]",
            "[NaN]",
            "[Infinity]",
            "[-Infinity]",
            "[1e999]",
            r#""\x41""#,
            r#""\v""#,
            r#""\'""#,
            "\"\\\n\"",
            r#""\ud800""#,
            "\"a\tb\"",
            "\"a\nb\"",
            "\"\u{1}\"",
            "[1 2]",
            r#"{"a": 1 "b": 2}"#,
            r#"{"a" 1}"#,
            "[,]",
            "{,}",
            "[1,,]",
            r#"{"a": 1,,}"#,
            "[1\u{a0}]",
            "1\u{a0}",
            "[\u{b}1]",
            "[1 / 2]",
            "# no\n1",
            "1 2",
            "{} {}",
            "[1]]",
            "1,",
            "/* for ever",
            "1 /*/",
            "\"open",
            "\"\\",
            "[1",
            r#"{"a":"#,
            "undefined",
            "True",
            "\u{feff}\u{feff}1",
        ] {
            assert!(read(text).is_err(), "{text:?} is {:?}", read(text));
        }
    }

    #[test]
    fn errors_have_a_line_and_a_column() {
        for (text, expected) in [
            ("{\n  // größe\n  \"a\": x\n}", "unexpected word at line 3 column 8"),
            ("{\n  \"ä\": 1\n  \"b\": 2\n}", "expected comma at line 2 column 9"),
            ("{\n  'a': 1\n}", "single-quoted strings are not allowed at line 2 column 3"),
            ("{\n  a: 1\n}", "expected string for object property at line 2 column 3"),
            ("[1,\n,]", "unexpected comma at line 2 column 1"),
            ("{} // {\n/* for ever", "unterminated comment block at line 2 column 1"),
            (
                "{\n  \"ä\": \"node:22,\n  \"b\": \"c\"\n}",
                "a line end or another control character in a string at line 2 column 17",
            ),
            ("{\n  \"a\":\u{a0}1}", "white space that JSON does not allow at line 2 column 7"),
        ] {
            assert_eq!(read(text), Err(expected.to_owned()), "{text}");
        }
    }

    #[test]
    fn excessive_nesting_is_an_error() {
        for (open, close) in [("[", "]"), ("{\"a\":", "}"), ("[{\"a\":", "}]"), ("[1,/**/\n[", "],]")] {
            let text = |depth: usize| format!("{}1{}", open.repeat(depth), close.repeat(depth));
            assert!(read(&text(200)).is_ok(), "{open}");
            for text in [text(100_000), open.repeat(100_000)] {
                let error = read(&text).unwrap_err();
                assert!(error.starts_with("maximum nesting depth exceeded at line "), "{open}: {error}");
            }
        }
    }

    proptest! {
        #[test]
        fn valid_json_is_parsed_unchanged(text in "[a-z\"\\\\/*, \n{}\\[\\]:1é]{0,64}") {
            if let Ok(value) = serde_json::from_str::<Value>(&text) {
                prop_assert_eq!(read(&text), Ok(value));
            }
        }

        #[test]
        fn text_without_comments_and_trailing_commas_must_be_json(
            text in "[\\[{]?([a\"'\\\\ :,+.0-2exNu\t\n\r\u{b}\u{a0}\u{1}#_]|\"a\"|true|null|\"a\":){1,8}[\\]}]?",
        ) {
            let is_trailing = text.trim_end_matches(['}', ']']).trim_end().ends_with(',');
            if !is_trailing && !text.trim().is_empty() {
                prop_assert_eq!(read(&text).is_ok(), serde_json::from_str::<Value>(&text).is_ok());
            }
        }
    }
}
