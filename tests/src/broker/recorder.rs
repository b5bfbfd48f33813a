//! What a client has sent over a WebSocket, readable: the head of its request, and its frames without their mask (RFC 6455,
//! 5.3), so that a secret in them can be searched for.

use std::sync::{Arc, Mutex};

/// Keeps what one client sends. Clones keep it together.
#[derive(Clone, Debug, Default)]
pub struct Recorder(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    is_upgraded: bool,
    unread: Vec<u8>,
    readable: Vec<u8>,
}

impl Recorder {
    /// Takes bytes as they came. Returns the head of the request when these bytes complete it.
    ///
    /// # Panics
    /// Never, unless another thread did with it.
    pub fn take(&self, bytes: &[u8]) -> Option<String> {
        let mut state = self.0.lock().unwrap();
        state.unread.extend_from_slice(bytes);
        if state.is_upgraded {
            state.unmask();
            return None;
        }
        state.readable.extend_from_slice(bytes);
        let end = state.unread.windows(4).position(|four| four == b"\r\n\r\n")?;
        let head = String::from_utf8_lossy(&state.unread[..end]).into_owned();
        state.unread.drain(..end + 4);
        state.is_upgraded = head.to_ascii_lowercase().contains("upgrade: websocket");
        if state.is_upgraded {
            state.unmask();
        }
        Some(head)
    }

    /// Everything so far.
    ///
    /// # Panics
    /// Never, unless another thread did with it.
    pub fn readable(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap().readable).into_owned()
    }
}

impl State {
    fn unmask(&mut self) {
        while let Some((at, length)) = frame(&self.unread) {
            let mask: [u8; 4] = self.unread[at..at + 4].try_into().unwrap();
            let payload = &self.unread[at + 4..at + 4 + length];
            let text: Vec<u8> =
                payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask).collect();
            self.readable.extend(text);
            self.unread.drain(..at + 4 + length);
        }
    }
}

/// Where the mask of the first whole frame is, and how long its payload.
fn frame(bytes: &[u8]) -> Option<(usize, usize)> {
    let (at, length) = match bytes.get(1)? & 0x7f {
        126 => (4, usize::from(u16::from_be_bytes(*bytes.get(2..4)?.first_chunk()?))),
        127 => (10, usize::try_from(u64::from_be_bytes(*bytes.get(2..10)?.first_chunk()?)).ok()?),
        short => (2, usize::from(short)),
    };
    (bytes.len() >= at + 4 + length).then_some((at, length))
}
