//! Closes a connection so that the peer still receives the answer.
//!
//! A socket that is closed with unread input resets its peer (TCP: RFC 1122, 4.2.2.13; Unix sockets:
//! `unix_release_sock` in net/unix/af_unix.c), and one that is closed while the peer writes fails that write. In both
//! cases a client that has sent more than was read, such as a request that is too long, may never read the answer. So
//! the side that has answered shuts down its direction, and then reads and discards input for a bounded time.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// How long the peer may keep its direction open.
const LINGER_TIME_MAX: Duration = Duration::from_secs(2);
/// The most bytes that it may send until then.
const LINGER_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Shuts down this side's direction, waits for a bounded time until the peer has shut down its own, and closes.
pub async fn linger(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let until_peer_end = async {
        // The peer is gone.
        if stream.shutdown().await.is_err() {
            return;
        }
        let mut discarded = [0; 8192];
        let mut bytes = 0;
        while let Ok(count @ 1..) = stream.read(&mut discarded).await {
            bytes += count;
            if bytes > LINGER_BYTES_MAX {
                return;
            }
        }
    };
    // After the timeout the connection is closed all the same.
    let _ = tokio::time::timeout(LINGER_TIME_MAX, until_peer_end).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use tokio::net::UnixStream;
    use tokio::time::Instant;

    #[tokio::test]
    async fn client_that_sent_too_much_reads_the_answer_and_eof() {
        let (mut client, mut server) = UnixStream::pair().unwrap();
        let answering = async {
            server.read_exact(&mut [0; 10]).await?;
            server.write_all(b"answer").await?;
            linger(server).await;
            Ok::<(), io::Error>(())
        };
        let asking = async {
            client.write_all(&vec![b'x'; 1024 * 1024]).await?;
            client.shutdown().await?;
            let mut answer = String::new();
            client.read_to_string(&mut answer).await?;
            Ok::<String, io::Error>(answer)
        };
        let (answered, asked) = tokio::join!(answering, asking);
        answered.unwrap();
        assert_eq!(asked.unwrap(), "answer");
    }

    #[tokio::test(start_paused = true)]
    async fn client_that_keeps_its_direction_open_is_closed() {
        let (client, server) = UnixStream::pair().unwrap();
        let started = Instant::now();
        linger(server).await;
        assert_eq!(started.elapsed(), LINGER_TIME_MAX);
        drop(client);
    }
}
