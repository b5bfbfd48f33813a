//! HAProxy for comparison: a widely used TCP relay, on the same path.

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
    /// Starts HAProxy between `front` and `back` inside `namespace`, and waits until it listens.
    ///
    /// # Panics
    /// If it does not listen.
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
        // The kernel ends HAProxy when the thread that started it ends. So this thread starts it, and enters the namespace
        // itself.
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
