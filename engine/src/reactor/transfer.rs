//! Moving bytes from one registered socket to another.

use super::table::Entry;
use super::{BufferOf, Key, Poller, Reactor, Readiness, Received, Sent, SocketIo, TransferMode};
use crate::sys::SocketError;

/// The result of [`Reactor::transfer`].
#[derive(Debug)]
pub enum Transfer<B> {
    /// Everything that was read is written. `full`: the read filled the buffer.
    Moved {
        /// The number of bytes.
        bytes: usize,
        /// Whether it was at least a full buffer, which indicates that there are more bytes.
        full: bool,
    },
    /// The destination did not accept everything.
    Blocked {
        /// The number of bytes read.
        bytes: usize,
        /// The bytes that are not written.
        held: B,
    },
    /// The destination is broken; the bytes that were read are lost.
    WriteFailed {
        /// The number of bytes read.
        bytes: usize,
    },
    /// The source has no bytes at present.
    Empty,
    /// The source has ended.
    Eof,
    /// The source is broken; every byte that preceded the break was read.
    ReadFailed,
    /// The source may have bytes that cannot be moved in this mode: no buffer or pipe is free, or splice cannot pass them.
    Unavailable(TransferMode),
}

impl<P: Poller> Reactor<P> {
    /// Reads once from one socket and writes the bytes to another.
    pub fn transfer(&mut self, from: Key, to: Key, mode: TransferMode) -> Transfer<BufferOf<P>> {
        match mode {
            TransferMode::Copy => {
                // Without a free buffer for the rest, no byte may be read.
                if !self.io.can_lend(TransferMode::Copy) {
                    return Transfer::Unavailable(TransferMode::Copy);
                }
                let Some(mut warm) = self.warm.take() else {
                    return Transfer::Unavailable(TransferMode::Copy);
                };
                let done = self.copy(&mut warm, from, to);
                self.warm = Some(warm);
                done
            }
            TransferMode::Splice => match self.io.lend(TransferMode::Splice) {
                Some(pipe) => self.splice(pipe, from, to),
                None => Transfer::Unavailable(TransferMode::Splice),
            },
        }
    }

    fn copy(&mut self, warm: &mut BufferOf<P>, from: Key, to: Key) -> Transfer<BufferOf<P>> {
        let Some(source) = self.table.entry_mut(from) else { return Transfer::ReadFailed };
        let Some(socket) = &source.socket else { return Transfer::ReadFailed };
        let bytes = match self.io.receive(socket, warm) {
            Received::Bytes(bytes) => bytes,
            other => return source.unread(other),
        };
        let full = bytes >= self.buffer_bytes;
        if !full {
            // If a FIN, a hang-up, an error or an urgent byte was reported, the socket stays readable because of it.
            source.ready -= Readiness::IN;
            self.doubt(from);
        }
        match self.write(to, warm) {
            Sent::All => Transfer::Moved { bytes, full },
            Sent::Failed(_) => Transfer::WriteFailed { bytes },
            Sent::Blocked => match self.io.keep(warm) {
                Some(held) => Transfer::Blocked { bytes, held },
                None => Transfer::WriteFailed { bytes },
            },
        }
    }

    fn splice(&mut self, mut pipe: BufferOf<P>, from: Key, to: Key) -> Transfer<BufferOf<P>> {
        let Some(source) = self.table.entry_mut(from) else { return Transfer::ReadFailed };
        let Some(socket) = &source.socket else { return Transfer::ReadFailed };
        let bytes = match self.io.receive(socket, &mut pipe) {
            Received::Bytes(bytes) => bytes,
            // tcp_read_sock() stops before an urgent byte and never passes it. The socket then seems empty, or ended after a
            // FIN. A read into a buffer passes the byte and finds the actual end.
            Received::Eof => return Transfer::Unavailable(TransferMode::Splice),
            Received::Empty if source.ready.contains(Readiness::PRI) => {
                return Transfer::Unavailable(TransferMode::Splice);
            }
            other => {
                let ended = source.unread(other);
                self.doubt(from);
                return ended;
            }
        };
        match self.write(to, &mut pipe) {
            Sent::All => Transfer::Moved { bytes, full: bytes >= self.buffer_bytes },
            Sent::Failed(_) => Transfer::WriteFailed { bytes },
            Sent::Blocked => Transfer::Blocked { bytes, held: pipe },
        }
    }

    /// Writes the contents of `buffer`.
    pub fn write(&mut self, to: Key, buffer: &mut BufferOf<P>) -> Sent {
        let failed = Sent::Failed(SocketError::Reset);
        let Some(sink) = self.table.entry_mut(to) else { return failed };
        let Some(socket) = &sink.socket else { return failed };
        let sent = self.io.send(socket, buffer);
        if sent == Sent::Blocked {
            sink.ready -= Readiness::OUT;
        }
        sent
    }
}

impl<S> Entry<S> {
    /// Converts the result of a read without bytes.
    fn unread<B>(&mut self, received: Received) -> Transfer<B> {
        match received {
            Received::Eof => Transfer::Eof,
            Received::Failed(_) => Transfer::ReadFailed,
            Received::Empty | Received::Bytes(_) => {
                self.ready -= Readiness::IN.union(Readiness::PRI);
                Transfer::Empty
            }
        }
    }
}
