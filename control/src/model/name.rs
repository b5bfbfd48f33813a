//! Names that people see: made safe to be a name (the rule of the wire specification, A.12), and made safe to be
//! printed. Pure.

use std::borrow::Cow;
use std::fmt::Write as _;

use sha2::{Digest, Sha256};

/// Makes a name of the last component of a path: characters outside `[A-Za-z0-9_.-]` become `-`, `tc-` goes in
/// front if it would not start with a letter or a digit, and a name that had other than ASCII characters gets `-`
/// and eight hex digits of the SHA-256 of the original, so that two such names do not become one.
pub fn sanitise(component: &str) -> String {
    let mut name: String = component
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-') { c } else { '-' })
        .collect();
    if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        name.insert_str(0, "tc-");
    }
    if !component.is_ascii() {
        name.push('-');
        name.push_str(&hex(&Sha256::digest(component.as_bytes())[..4]));
    }
    name
}

/// The bytes, two digits each.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Replaces what could move the cursor, colour, reorder or hide text on a terminal by its escape. For every string
/// that comes from inside a namespace: a process chooses its own name and its own arguments.
pub fn escape(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if is_unsafe(c) { safe.extend(c.escape_default()) } else { safe.push(c) }
    }
    Cow::Owned(safe)
}

/// Control characters (C0, DEL, C1), line separators, and the invisible ones that reorder (Unicode's bidirectional
/// controls) or vanish.
fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}')
        || matches!(c, '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_plain_component_is_its_own_name() {
        assert_eq!(sanitise("my_app-2.0"), "my_app-2.0");
    }

    #[test]
    fn other_characters_become_dashes() {
        assert_eq!(sanitise("my app:x"), "my-app-x");
    }

    #[test]
    fn a_name_starts_with_a_letter_or_digit() {
        assert_eq!(sanitise(".config"), "tc-.config");
        assert_eq!(sanitise(""), "tc-");
        assert_eq!(sanitise("-x"), "tc--x");
    }

    #[test]
    fn names_beyond_ascii_stay_apart() {
        // First eight digits of `printf é | sha256sum`.
        assert_eq!(sanitise("é"), "tc---4a99557e");
        assert_ne!(sanitise("é"), sanitise("è"));
    }

    #[test]
    fn escapes_reach_no_terminal() {
        assert_eq!(escape("node"), "node");
        assert_eq!(escape("a\u{1b}[31mb\n"), "a\\u{1b}[31mb\\n");
        assert_eq!(escape("x\u{202e}y\u{9b}"), "x\\u{202e}y\\u{9b}");
        assert_eq!(escape("größe"), "größe");
    }

    proptest! {
        #[test]
        fn an_escaped_text_has_nothing_left_to_escape(text in any::<String>()) {
            let safe = escape(&text).into_owned();
            prop_assert!(!safe.chars().any(is_unsafe));
            prop_assert_eq!(escape(&safe).into_owned(), safe.clone());
        }

        #[test]
        fn a_name_is_always_a_name(text in any::<String>()) {
            let name = sanitise(&text);
            prop_assert!(name.starts_with(|c: char| c.is_ascii_alphanumeric()));
            prop_assert!(name.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c)));
        }
    }
}
