//! The bytes that a client sent over a WebSocket, in readable form: the head of its request, and its frames without their
//! mask (RFC 6455, 5.3), so that a secret in them can be searched for.

use std::sync::{Arc, Mutex};

/// Records the bytes of one client. Clones share the record.
#[derive(Clone, Debug, Default)]
pub struct Recorder(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    is_upgraded: bool,
    unread: Vec<u8>,
    text: Vec<u8>,
}

impl Recorder {
    /// Records bytes in order of arrival. Returns the head of the request when these bytes complete it.
    ///
    /// # Panics
    /// If another thread panicked while it recorded.
    pub fn take(&self, bytes: &[u8]) -> Option<String> {
        let mut state = self.0.lock().unwrap();
        state.unread.extend_from_slice(bytes);
        if state.is_upgraded {
            state.unmask();
            return None;
        }
        state.text.extend_from_slice(bytes);
        let end = state.unread.windows(4).position(|four| four == b"\r\n\r\n")?;
        let head = String::from_utf8_lossy(&state.unread[..end]).into_owned();
        state.unread.drain(..end + 4);
        state.is_upgraded = head.to_ascii_lowercase().contains("upgrade: websocket");
        if state.is_upgraded {
            state.unmask();
        }
        Some(head)
    }

    /// Returns everything so far.
    ///
    /// # Panics
    /// If another thread panicked while it recorded.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap().text).into_owned()
    }
}

impl State {
    fn unmask(&mut self) {
        while let Some((at, length)) = frame(&self.unread) {
            let mask: [u8; 4] = self.unread[at..at + 4].try_into().unwrap();
            let payload = &self.unread[at + 4..at + 4 + length];
            let text: Vec<u8> =
                payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask).collect();
            self.text.extend(text);
            self.unread.drain(..at + 4 + length);
        }
    }
}

/// Returns the position of the mask of the first complete frame, and the length of its payload.
fn frame(bytes: &[u8]) -> Option<(usize, usize)> {
    let (at, length) = match bytes.get(1)? & 0x7f {
        126 => (4, usize::from(u16::from_be_bytes(*bytes.get(2..4)?.first_chunk()?))),
        127 => (10, usize::try_from(u64::from_be_bytes(*bytes.get(2..10)?.first_chunk()?)).ok()?),
        short => (2, usize::from(short)),
    };
    (bytes.len() >= at + 4 + length).then_some((at, length))
}
