//! TLS: the certificate that is served, read again when its files change.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio_rustls::TlsAcceptor;

use crate::config::Server;

/// The files, and what was read from them.
pub struct Certificates {
    cert: PathBuf,
    key: PathBuf,
    client_ca: Option<PathBuf>,
    serving: ArcSwap<ServerConfig>,
    /// When the files that were read last had been written, and what was wrong with them.
    read: Mutex<(Vec<Option<SystemTime>>, Option<String>)>,
}

impl Certificates {
    /// From the configuration; `None` if it names none.
    ///
    /// # Errors
    /// With a sentence for the operator.
    pub fn load(server: &Server) -> Result<Option<Arc<Self>>, String> {
        let (cert, key) = match (&server.tls_cert, &server.tls_key) {
            (None, None) if server.tls_client_ca.is_none() => return Ok(None),
            (Some(cert), Some(key)) => (cert.clone(), key.clone()),
            _ => {
                return Err(
                    "server.tls_cert and server.tls_key go together, and server.tls_client_ca with them".to_owned()
                );
            }
        };
        let client_ca = server.tls_client_ca.clone();
        let serving = ArcSwap::from_pointee(read(&cert, &key, client_ca.as_deref())?);
        let own = Self { cert, key, client_ca, serving, read: Mutex::default() };
        own.lock().0 = own.written();
        Ok(Some(Arc::new(own)))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, (Vec<Option<SystemTime>>, Option<String>)> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn written(&self) -> Vec<Option<SystemTime>> {
        let files = [Some(&self.cert), Some(&self.key), self.client_ca.as_ref()];
        files.into_iter().flatten().map(|f| std::fs::metadata(f).and_then(|m| m.modified()).ok()).collect()
    }

    /// Reads the files again if they changed. What cannot be used leaves the old in place, and says so.
    pub fn refresh(&self) {
        let written = self.written();
        if self.lock().0 == written {
            return;
        }
        let fault = match read(&self.cert, &self.key, self.client_ca.as_deref()) {
            Ok(config) => {
                self.serving.store(Arc::new(config));
                tracing::info!("the certificate was read again");
                None
            }
            Err(e) => {
                tracing::error!(error = %e, "the new certificate cannot be used; the old one is served on");
                Some(e)
            }
        };
        *self.lock() = (written, fault);
    }

    /// What is wrong with the files, if what is served is not what they hold.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        self.lock().1.clone()
    }

    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.serving.load_full())
    }
}

fn read(cert: &Path, key: &Path, client_ca: Option<&Path>) -> Result<ServerConfig, String> {
    let chain = certificates(cert)?;
    let secret =
        PrivateKeyDer::from_pem_file(key).map_err(|e| format!("the TLS key {} cannot be read: {e}", key.display()))?;
    let builder = ServerConfig::builder();
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(file) => {
            let mut roots = RootCertStore::empty();
            for ca in certificates(file)? {
                roots.add(ca).map_err(|e| format!("{}: {e}", file.display()))?;
            }
            // A certificate that is sent must be good; none need be sent.
            let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).allow_unauthenticated().build();
            builder.with_client_cert_verifier(verifier.map_err(|e| format!("{}: {e}", file.display()))?)
        }
    };
    let mut config = builder
        .with_single_cert(chain, secret)
        .map_err(|e| format!("certificate {} and key {} do not go together: {e}", cert.display(), key.display()))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let wrong = |e: &dyn std::fmt::Display| format!("the certificate {} cannot be read: {e}", file.display());
    let all: Result<Vec<_>, _> = CertificateDer::pem_file_iter(file).map_err(|e| wrong(&e))?.collect();
    let all = all.map_err(|e| wrong(&e))?;
    if all.is_empty() { Err(wrong(&"there is none in it")) } else { Ok(all) }
}
