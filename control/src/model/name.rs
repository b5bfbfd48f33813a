//! Makes names safe: as names of containers (wire specification, A.12), and for printing. Pure.

use std::borrow::Cow;
use std::fmt::Write as _;

use sha2::{Digest, Sha256};

/// Makes a name from the last component of a path. Characters outside `[A-Za-z0-9_.-]` become `-`. A name that would
/// not start with a letter or a digit gets the prefix `tc-`. A component with other than ASCII characters gets the
/// suffix `-` and eight hex digits of its SHA-256, so that two of those get different names.
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

/// Returns the bytes as text, two hex digits each.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Escapes characters that could move the cursor, colour, reorder or hide text on a terminal. Use it for every string
/// from inside a namespace: a process chooses its own name and its own arguments.
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
    fn plain_component_is_unchanged() {
        assert_eq!(sanitise("my_app-2.0"), "my_app-2.0");
    }

    #[test]
    fn other_characters_become_dashes() {
        assert_eq!(sanitise("my app:x"), "my-app-x");
    }

    #[test]
    fn name_starts_with_a_letter_or_digit() {
        assert_eq!(sanitise(".config"), "tc-.config");
        assert_eq!(sanitise(""), "tc-");
        assert_eq!(sanitise("-x"), "tc--x");
    }

    #[test]
    fn names_beyond_ascii_stay_distinct() {
        // First eight digits of `printf é | sha256sum`.
        assert_eq!(sanitise("é"), "tc---4a99557e");
        assert_ne!(sanitise("é"), sanitise("è"));
    }

    #[test]
    fn terminal_escapes_are_escaped() {
        assert_eq!(escape("node"), "node");
        assert_eq!(escape("a\u{1b}[31mb\n"), "a\\u{1b}[31mb\\n");
        assert_eq!(escape("x\u{202e}y\u{9b}"), "x\\u{202e}y\\u{9b}");
        assert_eq!(escape("größe"), "größe");
    }

    proptest! {
        #[test]
        fn escaping_is_idempotent(text in any::<String>()) {
            let safe = escape(&text).into_owned();
            prop_assert!(!safe.chars().any(is_unsafe));
            prop_assert_eq!(escape(&safe).into_owned(), safe.clone());
        }

        #[test]
        fn sanitised_name_is_always_valid(text in any::<String>()) {
            let name = sanitise(&text);
            prop_assert!(name.starts_with(|c: char| c.is_ascii_alphanumeric()));
            prop_assert!(name.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c)));
        }
    }
}
