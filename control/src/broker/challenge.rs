//! The challenge by which the host and an agent of landfall prove to each other that they hold the broker token,
//! without sending it. Pure: nonces are arguments.
//!
//! ```text
//!  host                                                  container
//!   ── GET /portbroker, Landfall-Challenge: 1 NAME HN ──────►
//!   ◄── 101, Landfall-Challenge: 1 CN proof("container") ────
//!   ── broker-hello {"proof": proof("host")} ───────────────►
//!   ◄── broker-hello-ack ────────────────────────────────────
//!
//!  proof(role) = HMAC-SHA-256(SHA-256(token), DOMAIN 0 role 0 NAME 0 HN CN)
//! ```
//!
//! HN and CN are 32 random bytes of each side; bytes are encoded as base64url without padding. A peer of the reference
//! implementation ignores the unknown header, and sends none.
//!
//! | attack | why it fails |
//! | --- | --- |
//! | an impostor reads the messages | no message contains the token, and a proof is valid only for its two nonces |
//! | it sends the challenge or the proof back | the role is part of each proof |
//! | it replays an earlier answer | the answer covers the host's nonce |
//! | it passes the challenge on to another container | the name is part of each proof, and a container that knows its
//! name answers only challenges for it |
//! | it answers like a peer of the reference implementation | the registration says that this container answers
//! (`challengeRequired`) |
//!
//! The frames that follow are not covered. A process that forwards all traffic to the real container, in both
//! directions, can read and change them; the check of the port's owner (`crate::sys::loopback`) protects against that.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::digest::Key;
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::model::registration::{ContainerName, Token};

/// The header of the request and of the answer.
pub const HEADER: &str = "landfall-challenge";
/// The version of this exchange, the first word of both headers.
const VERSION: &str = "1";
/// Separates these proofs from all other uses of a token.
const DOMAIN: &[u8] = b"landfall portbroker challenge 1";
/// Bytes of a nonce.
pub const NONCE_BYTES: usize = 32;

/// Random bytes that are used once.
pub type Nonce = [u8; NONCE_BYTES];

/// The reason why the answer to a challenge is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ChallengeError {
    /// The answer has another form.
    #[error("its answer to our challenge is malformed")]
    Malformed,
    /// The answer was computed without the token, for another container, or for another challenge.
    #[error("its answer to our challenge is wrong: the program there does not have the container's token")]
    Wrong,
}

/// The side that computes a proof.
#[derive(Clone, Copy)]
enum Role {
    Host,
    Container,
}

/// The challenge of a host to the container of this name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Challenge {
    name: ContainerName,
    nonce: Nonce,
}

impl Challenge {
    /// Creates a challenge from a nonce that was never used.
    pub fn new(name: ContainerName, nonce: Nonce) -> Challenge {
        Challenge { name, nonce }
    }

    /// Returns the container that has to answer.
    pub fn name(&self) -> &ContainerName {
        &self.name
    }

    /// Returns the header of the request.
    pub fn header(&self) -> String {
        format!("{VERSION} {} {}", self.name, URL_SAFE_NO_PAD.encode(self.nonce))
    }

    /// Parses the header of a request. Returns `None` for another form or version; such a header is ignored, as the
    /// reference implementation does.
    pub fn from_header(text: &str) -> Option<Challenge> {
        let [name, nonce] = words(text)?;
        Some(Challenge { name: ContainerName::new(name).ok()?, nonce: bytes(nonce)? })
    }

    /// The container's side: answers with a nonce that was never used.
    pub fn answer(self, token: Token, nonce: Nonce) -> Answer {
        Answer { exchange: Exchange { challenge: self, nonce }, token }
    }

    /// The host's side: checks the header of an answer, and returns the host's own proof, for the hello.
    ///
    /// # Errors
    /// [`ChallengeError`].
    pub fn check(self, token: &Token, answer: &str) -> Result<String, ChallengeError> {
        let [nonce, proof] = words(answer).ok_or(ChallengeError::Malformed)?;
        let nonce = bytes(nonce).ok_or(ChallengeError::Malformed)?;
        let exchange = Exchange { challenge: self, nonce };
        match exchange.is_proof(Role::Container, token, proof) {
            true => Ok(exchange.proof(Role::Host, token)),
            false => Err(ChallengeError::Wrong),
        }
    }
}

/// The answer of a container, and the proof that it expects of the host.
#[derive(Clone, Debug)]
pub struct Answer {
    exchange: Exchange,
    token: Token,
}

impl Answer {
    /// Returns the header of the answer.
    pub fn header(&self) -> String {
        let nonce = URL_SAFE_NO_PAD.encode(self.exchange.nonce);
        format!("{VERSION} {nonce} {}", self.exchange.proof(Role::Container, &self.token))
    }

    /// Returns whether this is the host's proof. Compares in constant time.
    pub fn accepts(&self, proof: &str) -> bool {
        self.exchange.is_proof(Role::Host, &self.token, proof)
    }
}

/// The values that both proofs cover.
#[derive(Clone, Debug)]
struct Exchange {
    challenge: Challenge,
    nonce: Nonce,
}

impl Exchange {
    /// Computes the MAC. The parts are unambiguous: role and name contain no NUL, and nonces have a fixed length.
    fn mac(&self, role: Role, token: &Token) -> Hmac<Sha256> {
        let role: &[u8] = match role {
            Role::Host => b"host",
            Role::Container => b"container",
        };
        // HMAC takes keys of one block; a digest and zeros is one (RFC 2104, section 2).
        let mut key = Key::<Hmac<Sha256>>::default();
        key.iter_mut().zip(Sha256::digest(token.reveal())).for_each(|(key, byte)| *key = byte);
        let mac = Hmac::<Sha256>::new(&key);
        [DOMAIN, b"\0", role, b"\0", self.challenge.name.as_str().as_bytes(), b"\0"]
            .into_iter()
            .chain([&self.challenge.nonce[..], &self.nonce[..]])
            .fold(mac, |mac, part| mac.chain_update(part))
    }

    fn proof(&self, role: Role, token: &Token) -> String {
        URL_SAFE_NO_PAD.encode(self.mac(role, token).finalize().into_bytes())
    }

    fn is_proof(&self, role: Role, token: &Token, proof: &str) -> bool {
        let Ok(proof) = URL_SAFE_NO_PAD.decode(proof) else { return false };
        self.mac(role, token).verify_slice(&proof).is_ok()
    }
}

/// Returns the two words after the version.
fn words(text: &str) -> Option<[&str; 2]> {
    let mut words = text.split(' ');
    let found = (words.next()?, [words.next()?, words.next()?], words.next());
    matches!(found, (VERSION, _, None)).then_some(found.1)
}

fn bytes(text: &str) -> Option<Nonce> {
    URL_SAFE_NO_PAD.decode(text).ok()?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(text: &str) -> ContainerName {
        ContainerName::new(text).unwrap()
    }

    fn token(text: &str) -> Token {
        Token::new(text).unwrap()
    }

    fn challenge(container: &str) -> Challenge {
        Challenge::new(name(container), [7; NONCE_BYTES])
    }

    #[test]
    fn peers_with_the_same_token_accept_each_others_proofs() {
        let sent = challenge("shop").header();
        let answer = Challenge::from_header(&sent).unwrap().answer(token("t"), [9; NONCE_BYTES]);
        let proof = challenge("shop").check(&token("t"), &answer.header()).unwrap();
        assert!(answer.accepts(&proof));
        for text in [sent.as_str(), &answer.header(), &proof] {
            assert!(!text.contains(token("t-is-secret").reveal()));
        }
    }

    #[test]
    fn an_answer_of_another_token_name_nonce_or_role_is_refused() {
        let answer = |container: &str, of: &str| challenge(container).answer(token(of), [9; NONCE_BYTES]);
        let check = |header: &str| challenge("shop").check(&token("t"), header);
        assert_eq!(check(&answer("shop", "u").header()), Err(ChallengeError::Wrong));
        assert_eq!(check(&answer("other", "t").header()), Err(ChallengeError::Wrong));
        let other = Challenge::new(name("shop"), [8; NONCE_BYTES]).answer(token("t"), [9; NONCE_BYTES]);
        assert_eq!(check(&other.header()), Err(ChallengeError::Wrong));
        // A proof of the host is not valid as a proof of the container, and the reverse.
        let genuine = answer("shop", "t");
        let proof = check(&genuine.header()).unwrap();
        let nonce = URL_SAFE_NO_PAD.encode([9; NONCE_BYTES]);
        assert_eq!(check(&format!("1 {nonce} {proof}")), Err(ChallengeError::Wrong));
        let own = genuine.header().rsplit(' ').next().unwrap().to_owned();
        assert!(!genuine.accepts(&own));
        assert!(!answer("shop", "u").accepts(&proof));
    }

    #[test]
    fn headers_of_another_form_are_malformed_or_ignored() {
        let own = challenge("shop").header();
        for text in ["", "1", "1 a", "2 a b", "1  a b", "1 a b c", own.as_str()] {
            let refused = challenge("shop").check(&token("t"), text);
            assert_eq!(refused, Err(ChallengeError::Malformed), "{text}");
        }
        for text in ["", "1 shop", "2 shop AA", "1 ../x AA", "1 shop AA", "1 shop !"] {
            assert_eq!(Challenge::from_header(text), None, "{text}");
        }
    }

    #[test]
    fn the_proofs_match_the_documented_formula() {
        // Computed with Python's `hmac`.
        let exchange = Exchange { challenge: challenge("shop"), nonce: [9; NONCE_BYTES] };
        assert_eq!(exchange.proof(Role::Host, &token("t")), HOST_PROOF);
        assert_eq!(exchange.proof(Role::Container, &token("t")), CONTAINER_PROOF);
    }

    const HOST_PROOF: &str = "oYDUoZC19Yrkg_gZ4WafoAb5so9477yStWQ8n85FApA";
    const CONTAINER_PROOF: &str = "9F5g_1YLSSGbDya1zMOwmtTpFRfys02puBLpbwUylTo";

    proptest! {
        #[test]
        fn arbitrary_text_neither_panics_nor_is_accepted(text: String) {
            let _ = Challenge::from_header(&text);
            prop_assert!(challenge("shop").check(&token("t"), &text).is_err());
            prop_assert!(!challenge("shop").answer(token("t"), [9; NONCE_BYTES]).accepts(&text));
        }
    }
}
