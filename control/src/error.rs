//! Renders an error and its causes as one line. Pure.

/// An error and its causes in one line, without the numbers that the standard library puts behind what the kernel
/// says: `Permission denied (os error 13)` tells nobody more than `Permission denied`.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut line = without_numbers(&error.to_string());
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = without_numbers(&error.to_string());
        // Some errors tell their cause themselves.
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    line
}

/// Takes ` (os error N)` out of a message.
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
    fn what_the_kernel_says_is_told_without_its_number() {
        assert_eq!(chain(&io::Error::from_raw_os_error(13)), "Permission denied");
        assert_eq!(without_numbers("a (os error 1): b (os error 2)"), "a: b");
        assert_eq!(without_numbers("a (os error"), "a (os error");
    }
}
