//! Ending a connection so that the answer arrives.
//!
//! A socket that is closed while input lies unread in it resets its peer (TCP: RFC 1122, 4.2.2.13; Unix sockets:
//! `unix_release_sock` in net/unix/af_unix.c), and one that is closed while the peer still writes breaks that write. In
//! both cases a client that has sent more than was read, such as a request that is too long, may never get to read why.
//! So the side that answered ends its own direction, and reads on for a while into nothing.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// How long a peer may go on before it is cut off.
const LINGER_TIME_MAX: Duration = Duration::from_secs(2);
/// How much it may say until then, in bytes.
const LINGER_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Ends our direction, waits until the peer has ended its own, for a bounded time, and closes.
pub async fn linger(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let until_its_end = async {
        // A peer that is gone has nothing to wait for.
        if stream.shutdown().await.is_err() {
            return;
        }
        let mut nothing = [0; 8192];
        let mut bytes = 0;
        while let Ok(count @ 1..) = stream.read(&mut nothing).await {
            bytes += count;
            if bytes > LINGER_BYTES_MAX {
                return;
            }
        }
    };
    // What is late is cut off.
    let _ = tokio::time::timeout(LINGER_TIME_MAX, until_its_end).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use tokio::net::UnixStream;
    use tokio::time::Instant;

    #[tokio::test]
    async fn a_client_that_sent_too_much_still_reads_the_answer_and_an_end() {
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
    async fn a_client_that_never_ends_is_cut_off() {
        let (client, server) = UnixStream::pair().unwrap();
        let began = Instant::now();
        linger(server).await;
        assert_eq!(began.elapsed(), LINGER_TIME_MAX);
        drop(client);
    }
}
