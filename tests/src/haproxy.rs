//! HAProxy as a second opinion: a TCP relay that many people trust, on the same path.

use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};

use crate::{Namespace, wait_until};

/// A running HAProxy that relays from one address to another.
#[derive(Debug)]
pub struct Haproxy {
    child: Child,
    directory: std::path::PathBuf,
}

impl Haproxy {
    /// Starts it between `front` and `back` inside `namespace`, and waits until it listens.
    ///
    /// # Panics
    /// When it does not.
    pub fn start(namespace: &Namespace, front: SocketAddr, back: SocketAddr) -> Haproxy {
        let directory = std::env::temp_dir().join(format!("landfall-haproxy-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o700)).unwrap();
        let file = directory.join("haproxy.cfg");
        let text = format!(
            "global\n  maxconn 1000\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1h\n  \
             timeout server 1h\n  option splice-request\n  option splice-response\n\
             listen relay\n  bind {front}\n  server inside {back}\n"
        );
        std::fs::write(&file, text).unwrap();
        // Ended with the thread that starts it, however that ends; so it is this one, and enters by itself.
        let child = Command::new("setpriv")
            .args([
                "--pdeathsig",
                "KILL",
                "nsenter",
                &format!("--net={}", namespace.path()),
                "haproxy",
                "-db",
                "-q",
                "-f",
            ])
            .arg(&file)
            .stdout(Stdio::null())
            .spawn()
            .expect("haproxy, setpriv and nsenter (util-linux) are needed");
        let mut haproxy = Haproxy { child, directory };
        wait_until("haproxy to listen", || match haproxy.child.try_wait().unwrap() {
            Some(status) => panic!("haproxy ended: {status}"),
            None => namespace.run(|| TcpStream::connect(front).map(drop)),
        });
        haproxy
    }
}

impl Drop for Haproxy {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}
