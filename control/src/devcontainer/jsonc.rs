//! JSON with comments and trailing commas becomes plain JSON. Pure.
//!
//! What is not JSON is made blank, byte for byte, so that the place that a parser complains about is the place in the
//! text. Everything else is left to the parser: it bounds the depth, and it says what is wrong.

/// The same text without `// …`, `/* … */` and commas before a closing bracket, each byte of which is a blank instead.
pub(super) fn plain(text: &str) -> String {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut bytes = text.as_bytes().to_vec();
    let mut at = 0;
    // The comma after which nothing but blanks and comments has come.
    let mut comma = None;
    while let Some(byte) = bytes.get(at).copied() {
        match (byte, bytes.get(at + 1)) {
            (b'"', _) => {
                comma = None;
                at = end_of_string(&bytes, at);
            }
            (b'/', Some(b'/')) => at = blank(&mut bytes, at, |rest| rest.first() == Some(&b'\n')),
            (b'/', Some(b'*')) => {
                bytes[at + 1] = b' ';
                at = blank(&mut bytes, at, |rest| rest.starts_with(b"*/"));
                let end = (at + 2).min(bytes.len());
                bytes[at..end].fill(b' ');
                at = end;
            }
            _ => {
                match byte {
                    b',' => comma = Some(at),
                    b']' | b'}' => {
                        if let Some(comma) = comma.take() {
                            bytes[comma] = b' ';
                        }
                    }
                    _ if byte.is_ascii_whitespace() => {}
                    _ => comma = None,
                }
                at += 1;
            }
        }
    }
    // Only whole comments and ASCII characters were replaced.
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Makes everything blank but line ends, up to where `ends` says or the text does, and says where that is.
fn blank(bytes: &mut [u8], from: usize, ends: impl Fn(&[u8]) -> bool) -> usize {
    let mut at = from;
    while at < bytes.len() && !ends(&bytes[at..]) {
        if bytes[at] != b'\n' {
            bytes[at] = b' ';
        }
        at += 1;
    }
    at
}

/// Where the string that begins at `from` is over.
fn end_of_string(bytes: &[u8], from: usize) -> usize {
    let mut at = from + 1;
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn read(text: &str) -> serde_json::Result<Value> {
        serde_json::from_str(&plain(text))
    }

    #[test]
    fn comments_and_trailing_commas_are_no_part_of_the_value() {
        let text =
            "\u{feff}// größe\n{ /* a, } */ \"a\": [1, 2, /* x */ ], // }\n \"b\": {\"c\": 1, }, }/**/";
        assert_eq!(read(text).unwrap(), json!({"a": [1, 2], "b": {"c": 1}}));
    }

    #[test]
    fn what_stands_in_a_string_stays() {
        for text in [r#""// no""#, r#""/* no */,]""#, r#""\"// no""#, r#""\\""#] {
            assert_eq!(plain(text), text);
        }
    }

    #[test]
    fn what_is_wrong_stays_wrong_and_where_it_was() {
        for text in ["[1,,]", "{\"a\" 1}", "/* for ever", "\"open", "[1 / 2]", "/*/", "", "\"\\"] {
            assert!(read(text).is_err(), "{text}");
        }
        let error = read("{\n  // größe\n  \"a\": x\n}").unwrap_err();
        assert_eq!((error.line(), error.column()), (3, 8));
    }

    proptest! {
        #[test]
        fn json_is_left_as_it_is(text in "[a-z\"\\\\/*, \n{}\\[\\]:1é]{0,64}") {
            if let Ok(value) = serde_json::from_str::<Value>(&text) {
                prop_assert_eq!(read(&text).unwrap(), value);
            }
            prop_assert_eq!(plain(&text).len(), text.len());
        }
    }
}
