//! One stream: the bytes between a socket and the WebSocket, in both directions, until the stream is over. The same on both
//! sides of the broker.

use std::io;

use bytes::BytesMut;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

pub use self::inlet::{Inlet, Inlets, Outlet};
use super::message::{Extensions, Frame, PAYLOAD_BYTES_MAX, Side, StreamId};
use super::outbox::{Lane, Outbox};

mod inlet;

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Our end closed, or broke, and the peer was told.
    ByUs,
    /// The peer ended it.
    ByPeer,
    /// The WebSocket is gone.
    Lost,
    /// More arrived than is kept for a socket that does not read, or than was granted; the peer was told.
    Overflown,
}

/// Relays a stream that is open until it is over, and closes the socket: `us` is our side of it, `extensions` what is in
/// use, `arriving` what comes from the peer. Dropping the future resets nothing by itself: the socket is closed.
pub async fn relay(
    socket: TcpStream,
    stream: StreamId,
    us: Side,
    extensions: Extensions,
    outbox: &Outbox,
    arriving: Outlet,
) -> Ended {
    let lane = outbox.lane(stream, extensions.binary);
    let (reading, mut writing) = socket.into_split();
    let outgoing = async {
        loop {
            let sent = async {
                reading.readable().await?;
                let room = lane.room(PAYLOAD_BYTES_MAX).await.map_err(io::Error::other)?;
                let mut buffer = BytesMut::with_capacity(PAYLOAD_BYTES_MAX);
                match reading.try_read_buf(&mut buffer) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                    Err(error) => return Err(error),
                    Ok(0) => return Ok(false),
                    Ok(_) => lane.payload(buffer.freeze(), room),
                }
                Ok(true)
            };
            if !matches!(sent.await, Ok(true)) {
                break Ended::ByUs;
            }
        }
    };
    let incoming = async {
        loop {
            match arriving.next().await {
                Err(inlet::Overflow) => break Ended::Overflown,
                Ok(None) => break Ended::Lost,
                Ok(Some(Frame::Data(payload))) => {
                    if writing.write_all(&payload).await.is_err() {
                        break Ended::ByUs;
                    }
                    arriving.release(payload.len());
                }
                Ok(Some(_)) => break Ended::ByPeer,
            }
        }
    };
    let ended = tokio::select! {
        ended = outgoing => ended,
        ended = incoming => ended,
    };
    tell(&lane, us, ended);
    // The peer may be gone already.
    let _ = writing.shutdown().await;
    ended
}

fn tell(lane: &Lane, us: Side, ended: Ended) {
    match ended {
        Ended::ByUs | Ended::Overflown => lane.end(Frame::Close(us)),
        Ended::ByPeer | Ended::Lost => lane.discard(),
    }
}
