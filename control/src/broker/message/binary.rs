//! Payload in binary messages (extension `binary`): the byte 1, the stream id as four bytes (big endian), the payload.

use bytes::{BufMut, Bytes, BytesMut};

use super::{Frame, StreamId, Unreadable};

/// The size of the header before the payload, in bytes. Code that reads payload into a buffer leaves this much room
/// before it.
pub const BINARY_HEADER_BYTES: usize = 5;

/// The first byte of a frame that carries payload.
const DATA: u8 = 1;

/// Returns the header of a stream's payload. Returns `None` if the id does not fit into four bytes; such payload is
/// sent as text.
#[must_use]
pub fn binary_header(stream: StreamId) -> Option<[u8; BINARY_HEADER_BYTES]> {
    let [a, b, c, d] = u32::try_from(stream.0).ok()?.to_be_bytes();
    Some([DATA, a, b, c, d])
}

/// Returns a complete binary message, or `None` if the id does not fit into four bytes.
#[must_use]
pub fn to_binary(stream: StreamId, payload: &[u8]) -> Option<Bytes> {
    let header = binary_header(stream)?;
    let mut frame = BytesMut::with_capacity(header.len() + payload.len());
    frame.put_slice(&header);
    frame.put_slice(payload);
    Some(frame.freeze())
}

/// Parses a binary message. `Ok(None)` is a message of an unknown kind. The payload is a slice of `frame`, not a copy.
///
/// # Errors
/// [`Unreadable::CutShort`].
pub fn from_binary(mut frame: Bytes) -> Result<Option<(StreamId, Frame)>, Unreadable> {
    let &[kind, a, b, c, d] = frame.first_chunk().ok_or(Unreadable::CutShort)?;
    if kind != DATA {
        return Ok(None);
    }
    let payload = frame.split_off(BINARY_HEADER_BYTES);
    Ok(Some((StreamId(u32::from_be_bytes([a, b, c, d]).into()), Frame::Data(payload))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_frame_is_one_byte_four_bytes_and_the_payload() {
        let frame = to_binary(StreamId(0x0102_0304), b"payload").unwrap();
        assert_eq!(frame, &b"\x01\x01\x02\x03\x04payload"[..]);
        let read = from_binary(frame).unwrap().unwrap();
        assert_eq!(read, (StreamId(0x0102_0304), Frame::Data(Bytes::from_static(b"payload"))));
    }

    #[test]
    fn an_id_that_exceeds_four_bytes_has_no_binary_form() {
        assert_eq!(binary_header(StreamId(-1)), None);
        assert_eq!(binary_header(StreamId(i64::from(u32::MAX) + 1)), None);
        assert!(binary_header(StreamId(i64::from(u32::MAX))).is_some());
        assert!(binary_header(StreamId(0)).is_some());
    }

    #[test]
    fn unknown_kinds_are_ignored_and_truncated_frames_are_errors() {
        assert_eq!(from_binary(Bytes::from_static(b"\x02\0\0\0\x01x")), Ok(None));
        assert_eq!(from_binary(Bytes::from_static(b"\x01\0\0\0")), Err(Unreadable::CutShort));
        assert_eq!(from_binary(Bytes::new()), Err(Unreadable::CutShort));
    }

    proptest! {
        #[test]
        fn a_written_frame_is_read_back(stream in 0..=u32::MAX, payload: Vec<u8>) {
            let stream = StreamId(stream.into());
            let frame = to_binary(stream, &payload).unwrap();
            prop_assert_eq!(frame.len(), payload.len() + BINARY_HEADER_BYTES);
            prop_assert_eq!(from_binary(frame), Ok(Some((stream, Frame::Data(payload.into())))));
        }
    }
}
