//! One request line out of a stream of bytes, however they are cut (wire specification, A.1.1 and A.1.2). Pure.
//!
//! A connection carries one request, so the codec is done with the first line, and what follows is nobody's. The limit
//! is on bytes up to and with the newline: whether a request is too long is decided by its first 65,536 bytes alone,
//! never by how the kernel happened to cut the stream. Bytes are decoded once, when the line is whole.

use thiserror::Error;

/// The most bytes of a request, its newline among them.
pub const LINE_BYTES_MAX: usize = 65_536;

/// No line will come of this. The texts are the wire's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum LineError {
    /// More than [`LINE_BYTES_MAX`] bytes came, and no newline within them.
    #[error("request exceeds buffer limit")]
    TooLong,
}

/// A request line that is still coming. It holds [`LINE_BYTES_MAX`] bytes at the most.
#[derive(Debug, Default)]
pub struct RequestLine {
    /// What came so far; no newline is in it.
    held: Vec<u8>,
}

impl RequestLine {
    /// A line of which nothing came yet.
    pub fn new() -> RequestLine {
        RequestLine::default()
    }

    /// Takes what came. `None` while the line is not whole; else the line without its newline, or why there is none,
    /// and then the connection is done with.
    pub fn take(&mut self, chunk: &[u8]) -> Option<Result<Vec<u8>, LineError>> {
        let room = LINE_BYTES_MAX - self.held.len();
        let within = &chunk[..chunk.len().min(room)];
        if let Some(end) = within.iter().position(|byte| *byte == b'\n') {
            self.held.extend_from_slice(&within[..end]);
            return Some(Ok(std::mem::take(&mut self.held)));
        }
        if chunk.len() > room {
            self.held = Vec::new();
            return Some(Err(LineError::TooLong));
        }
        self.held.extend_from_slice(within);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn one_shot(bytes: &[u8]) -> Option<Result<Vec<u8>, LineError>> {
        RequestLine::new().take(bytes)
    }

    /// The same bytes, cut at `cuts`.
    fn in_pieces(bytes: &[u8], cuts: &[usize]) -> Option<Result<Vec<u8>, LineError>> {
        let mut line = RequestLine::new();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        cuts.windows(2).find_map(|ends| line.take(&bytes[ends[0]..ends[1]]))
    }

    #[test]
    fn the_first_line_is_the_request_and_the_rest_is_nobodys() {
        assert_eq!(one_shot(b"{}\n{\"kind\":\"shutdown\"}\n"), Some(Ok(b"{}".to_vec())));
        assert_eq!(one_shot(b"\n"), Some(Ok(Vec::new())));
        assert_eq!(one_shot(b"{}"), None);
        assert_eq!(one_shot(b""), None);
    }

    #[test]
    fn a_line_of_65535_bytes_and_its_newline_is_the_longest() {
        let mut bytes = vec![b'x'; LINE_BYTES_MAX - 1];
        bytes.push(b'\n');
        assert_eq!(one_shot(&bytes).unwrap().unwrap().len(), LINE_BYTES_MAX - 1);
        bytes.insert(0, b'x');
        assert_eq!(one_shot(&bytes), Some(Err(LineError::TooLong)));
        bytes.pop();
        assert_eq!(one_shot(&bytes), None, "65,536 bytes are not more than 65,536");
    }

    #[test]
    fn what_follows_a_short_line_does_not_make_it_too_long() {
        let mut bytes = b"{}\n".to_vec();
        bytes.resize(3 * LINE_BYTES_MAX, b'x');
        assert_eq!(one_shot(&bytes), Some(Ok(b"{}".to_vec())));
    }

    proptest! {
        #[test]
        fn any_chunking_equals_one_shot(
            bytes in proptest::collection::vec(prop_oneof![4 => any::<u8>(), 1 => Just(b'\n')], 0..300),
            cuts in proptest::collection::vec(any::<usize>(), 0..20),
        ) {
            prop_assert_eq!(in_pieces(&bytes, &cuts), one_shot(&bytes));
        }

        #[test]
        fn any_chunking_near_the_limit_equals_one_shot(
            length in LINE_BYTES_MAX - 3..LINE_BYTES_MAX + 3,
            after in 0usize..9,
            cuts in proptest::collection::vec(any::<usize>(), 0..6),
        ) {
            let mut bytes = vec![b'x'; length];
            bytes.push(b'\n');
            bytes.resize(length + 1 + after, b'y');
            prop_assert_eq!(in_pieces(&bytes, &cuts), one_shot(&bytes));
            prop_assert_eq!(one_shot(&bytes).unwrap().is_ok(), length < LINE_BYTES_MAX);
        }
    }
}
