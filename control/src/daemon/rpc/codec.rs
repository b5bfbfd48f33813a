//! Extracts the request line from a stream of bytes in arbitrary chunks (wire specification, A.1.1 and A.1.2). Pure.
//!
//! A connection carries one request. The codec ends with the first line and ignores later bytes. The limit counts the bytes
//! of the line and its newline, so whether a request is too long depends on its first 65,536 bytes and never on the chunks.
//! Bytes are decoded once, when the line is complete.

use thiserror::Error;

/// The maximum size of a request with its newline, in bytes.
pub const LINE_BYTES_MAX: usize = 65_536;

/// The reasons why a stream has no request line. The texts are part of the wire specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum LineError {
    /// The first [`LINE_BYTES_MAX`] bytes contain no newline.
    #[error("request exceeds buffer limit")]
    TooLong,
}

/// A partial request line of at most [`LINE_BYTES_MAX`] bytes.
#[derive(Debug, Default)]
pub struct RequestLine {
    /// The bytes so far, without a newline.
    partial: Vec<u8>,
}

impl RequestLine {
    /// Returns an empty line.
    pub fn new() -> RequestLine {
        RequestLine::default()
    }

    /// Appends a chunk. Returns `None` while the line is incomplete, and otherwise the line without its newline or an error.
    /// After a result, the connection accepts no more bytes.
    pub fn append(&mut self, chunk: &[u8]) -> Option<Result<Vec<u8>, LineError>> {
        let room = LINE_BYTES_MAX - self.partial.len();
        let within = &chunk[..chunk.len().min(room)];
        if let Some(end) = within.iter().position(|byte| *byte == b'\n') {
            self.partial.extend_from_slice(&within[..end]);
            return Some(Ok(std::mem::take(&mut self.partial)));
        }
        if chunk.len() > room {
            self.partial = Vec::new();
            return Some(Err(LineError::TooLong));
        }
        self.partial.extend_from_slice(within);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn one_shot(bytes: &[u8]) -> Option<Result<Vec<u8>, LineError>> {
        RequestLine::new().append(bytes)
    }

    /// Feeds the same bytes, cut at `cuts`.
    fn in_chunks(bytes: &[u8], cuts: &[usize]) -> Option<Result<Vec<u8>, LineError>> {
        let mut line = RequestLine::new();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        cuts.windows(2).find_map(|ends| line.append(&bytes[ends[0]..ends[1]]))
    }

    #[test]
    fn the_first_line_is_the_request_and_later_bytes_are_ignored() {
        assert_eq!(one_shot(b"{}\n{\"kind\":\"shutdown\"}\n"), Some(Ok(b"{}".to_vec())));
        assert_eq!(one_shot(b"\n"), Some(Ok(Vec::new())));
        assert_eq!(one_shot(b"{}"), None);
        assert_eq!(one_shot(b""), None);
    }

    #[test]
    fn the_longest_line_has_65535_bytes_and_a_newline() {
        let mut bytes = vec![b'x'; LINE_BYTES_MAX - 1];
        bytes.push(b'\n');
        assert_eq!(one_shot(&bytes).unwrap().unwrap().len(), LINE_BYTES_MAX - 1);
        bytes.insert(0, b'x');
        assert_eq!(one_shot(&bytes), Some(Err(LineError::TooLong)));
        bytes.pop();
        assert_eq!(one_shot(&bytes), None, "65,536 bytes are not more than 65,536");
    }

    #[test]
    fn bytes_after_a_short_line_do_not_make_it_too_long() {
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
            prop_assert_eq!(in_chunks(&bytes, &cuts), one_shot(&bytes));
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
            prop_assert_eq!(in_chunks(&bytes, &cuts), one_shot(&bytes));
            prop_assert_eq!(one_shot(&bytes).unwrap().is_ok(), length < LINE_BYTES_MAX);
        }
    }
}
