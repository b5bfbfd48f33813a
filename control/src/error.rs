//! Renders an error and its causes as one line. Pure.

/// Returns an error and its causes as one line, without the error numbers of the standard library: in
/// `Permission denied (os error 13)` the number adds no information for users.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut line = without_numbers(&error.to_string());
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = without_numbers(&error.to_string());
        // The text of some errors includes their cause.
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    line
}

/// Removes ` (os error N)` from a message.
fn without_numbers(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(" (os error ") {
        clean.push_str(before);
        rest = after.split_once(')').map_or("", |(_, rest)| rest);
    }
    clean.push_str(rest);
    clean
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[test]
    fn error_numbers_are_removed() {
        assert_eq!(chain(&io::Error::from_raw_os_error(13)), "Permission denied");
        assert_eq!(without_numbers("a (os error 1): b (os error 2)"), "a: b");
        assert_eq!(without_numbers("a (os error"), "a (os error");
    }
}
